"""Bits that a broken chip sets or flips, in values that look plausible."""

from collections.abc import Callable
from dataclasses import replace
from itertools import chain

import torch
from torch import Tensor

from lightning_byzantine.aggregators import Report
from lightning_byzantine.matrix import WorkerMatrix
from lightning_byzantine.utilities.medians import known_median

__all__ = ["BitCount", "count_bits", "unlikely_bits"]

# Of a float32's mantissa, without its lowest three bits, which depend on what numbers a value was multiplied by.
_BITS = range(3, 23)
# About how many of a row's columns are looked at: enough for the highest bit's bias, and quick.
_SAMPLE = 4096
# Of fewer values nothing can be told.
_FEW = 100
# From how many standard deviations on a bit is unlikely. Sound workers' double momentum is in one of a hundred steps.
_UNLIKELY = 8.0
# Median of the square of a standard normal variable.
_MEDIAN_OF_SQUARES = 0.4549


def count_bits(rows: Tensor, num_columns: int) -> Tensor:
    """Count, in each row, the values that have all digits, and among these, for each bit, those in which it is set.

    It looks at the 20 highest bits of the mantissa in up to 4096 columns, evenly spread. Neither 0 nor what is
    subnormal in its dtype, infinite or NaN is counted.

    Args:
        rows: [m, c], of any floating-point dtype; other than float32 are converted.
        num_columns: of all blocks together, c being those of one.

    Returns:
        [m, 21] float64, on the device of ``rows``; may be added up over blocks and ranks.

    Example:
        >>> count_bits(torch.tensor([[1.0, 1.5, -3.0, 0.0]]), num_columns=4)[0, [0, -1]]  # 1.5 and 3 = 2 x 1.5
        tensor([3., 2.], dtype=torch.float64)

    """
    # An odd stride meets every column of a layer's weights, whose widths are even as a rule.
    sample = rows[:, :: max(1, -(-num_columns // _SAMPLE)) | 1].contiguous()
    values = sample.float()
    smallest = max(torch.finfo(dtype).tiny for dtype in (rows.dtype, torch.float32))
    present = (values.abs() >= smallest) & values.isfinite()
    bits = values.view(torch.int32)
    counts = [present.sum(1), *((bits >> place & present).sum(1) for place in _BITS)]
    return torch.stack(counts, dim=1).double()


def unlikely_bits(counts: Tensor) -> Tensor | None:
    """Return whose mantissas are not like those of the others, [m] bool, or None if nobody can be judged.

    ::

        p_ib = share of worker i's n_i values that have bit b set;  c_b = median_i p_ib
        z_ib = (p_ib - c_b) / sqrt(c_b (1 - c_b) (1 / n_i + 1 / median n))
        unlikely where |z_ib| > 8 max(1, s_i, s);  s_i^2 = median_b z_ib^2 / 0.4549, s^2 = median_ib z_ib^2 / 0.4549

    Values of many sizes begin with 1 more often than with larger digits (Benford's law), so that even the highest bit's
    flip shows. s and s_i are above 1 where values depend on one another: a bit has to stand out from all others and,
    since colluders can make s small, from the worker's own. While fewer than half of those with 100 values or more are
    faulty, c lies within what the sound ones have; unless more than half of all have as many, nobody is judged.

    Args:
        counts: [m, 21], of :func:`count_bits`.

    Source: Benford, "The law of anomalous numbers", Proceedings of the American Philosophical Society 78 (1938).

    Example:
        >>> values = torch.randn(5, 1000, generator=torch.Generator().manual_seed(0)).exp()
        >>> values[3] = values[3].view(torch.int32).bitwise_or(1 << 20).view(torch.float32)  # is stuck
        >>> unlikely_bits(count_bits(values, num_columns=1000))
        tensor([False, False, False,  True, False])

    """
    sizes = torch.where(counts[:, :1] >= _FEW, counts[:, :1], torch.nan)
    if 2 * int(sizes.isfinite().sum()) <= len(sizes):
        return None
    shares = counts[:, 1:] / sizes
    center = torch.tensor([known_median(of_bit) for of_bit in shares.T.tolist()], dtype=torch.float64)
    usual = known_median(sizes.flatten().tolist())
    # A single value's weight where a bit is the same in all of them.
    variance = (center * (1 - center)).clamp(min=1 / usual) * (1 / sizes + 1 / usual)
    squares = (shares - center).square() / variance
    # What half precision does not have is 0 in all values.
    varied = torch.where((center > 0) & (center < 1), squares, torch.nan).tolist()
    of_all = known_median(chain.from_iterable(varied))
    usual_square = torch.tensor([[max(known_median(of_row), of_all)] for of_row in varied], dtype=torch.float64)
    spread = (usual_square / _MEDIAN_OF_SQUARES).nan_to_num(1.0).clamp(min=1)
    return (squares > _UNLIKELY**2 * spread).any(1)


class BitCount:
    """How often each mantissa bit is set in each worker's row, summed over ranks along with the first statistic.

    Args:
        matrix: the rows.
        wanted: whether to count at all.

    Example:
        >>> from lightning_byzantine.aggregators import Krum
        >>> matrix = WorkerMatrix([torch.randn(3, 500, generator=torch.Generator().manual_seed(0))])
        >>> bits = BitCount(matrix, wanted=True)
        >>> decision = Krum().decide(bits.counted_with(matrix), num_byzantine=1)
        >>> bits.added_to(decision.report(), workers=torch.arange(3)).unlikely
        tensor([False, False, False])

    """

    def __init__(self, matrix: WorkerMatrix, wanted: bool) -> None:
        self._matrix = matrix
        self._wanted = wanted
        self._counts: Tensor | None = None

    def counted_with(self, matrix: WorkerMatrix) -> WorkerMatrix:
        """Return a matrix whose first statistic brings the counts along: one collective for both."""
        return matrix.completed_by(self._complete_both) if self._wanted else matrix

    def added_to(self, report: Report, workers: Tensor) -> Report:
        """Return the report, with whose bits are unlike the others'.

        Args:
            report: on all workers.
            workers: indices of those to compare; the others' bits are not called unlikely.

        """
        unlikely = None if self._counts is None else unlikely_bits(self._counts.cpu()[workers])
        if unlikely is None:
            return report
        of_all = torch.zeros(self._matrix.num_workers, dtype=torch.bool)
        of_all[workers] = unlikely
        return replace(report, unlikely=of_all)

    def _complete_both(self, complete: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
        def completed(total: Tensor) -> Tensor:
            if self._counts is not None:
                return complete(total)
            # Only now, when all blocks have arrived for the statistic.
            blocks = self._matrix.blocks
            num_columns = sum(block.shape[1] for block in blocks)
            counts = torch.stack([count_bits(block, num_columns) for block in blocks]).sum(0)
            sums = complete(torch.cat([total.flatten(), counts.flatten()]))
            self._counts = sums[total.numel() :].view(counts.shape)
            return sums[: total.numel()].view(total.shape)

        return completed
