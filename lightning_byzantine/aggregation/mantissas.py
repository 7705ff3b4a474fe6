"""Detection of mantissa bits that a faulty chip sets or flips, in values that look plausible."""

from collections.abc import Callable
from dataclasses import replace
from itertools import chain

import torch
from torch import Tensor

from lightning_byzantine.aggregators import Report
from lightning_byzantine.matrix import WorkerMatrix
from lightning_byzantine.utilities.medians import known_median

__all__ = ["BitCount", "count_bits", "unlikely_bits"]

# Bits of a float32's mantissa, without the lowest three, which depend on the factors that a value was multiplied by.
_BITS = range(3, 23)
# Approximate number of sampled columns of a row: enough for the bias of the highest bit, and fast.
_SAMPLE = 4096
# Rows with fewer values are not judged.
_FEW = 100
# Standard deviations from which a bit is unlikely. Honest double momentum exceeds this in one of a hundred steps.
_UNLIKELY = 8.0
# Median of the square of a standard normal variable.
_MEDIAN_OF_SQUARES = 0.4549


def count_bits(rows: Tensor, num_columns: int) -> Tensor:
    """Count the normal values in each row and, for each bit, those in which it is set.

    The 20 highest bits of the mantissa are counted in up to 4096 evenly spaced columns. Zeros, subnormal numbers of the
    dtype, infinities and NaN are not counted.

    Args:
        rows: [m, c], of any floating-point dtype; converted to float32.
        num_columns: number of columns of all blocks, of which ``rows`` is one.

    Returns:
        [m, 21] float64, on the device of ``rows``; may be summed over blocks and ranks.

    Example:
        >>> count_bits(torch.tensor([[1.0, 1.5, -3.0, 0.0]]), num_columns=4)[0, [0, -1]]  # 1.5 and 3 = 2 x 1.5
        tensor([3., 2.], dtype=torch.float64)

    """
    # An odd stride reaches every column of a layer's weights, whose widths are usually even.
    sample = rows[:, :: max(1, -(-num_columns // _SAMPLE)) | 1].contiguous()
    values = sample.float()
    smallest = max(torch.finfo(dtype).tiny for dtype in (rows.dtype, torch.float32))
    present = (values.abs() >= smallest) & values.isfinite()
    bits = values.view(torch.int32)
    counts = [present.sum(1), *((bits >> place & present).sum(1) for place in _BITS)]
    return torch.stack(counts, dim=1).double()


def unlikely_bits(counts: Tensor) -> Tensor | None:
    """Return which workers' mantissas differ from the others', [m] bool, or None if there are too few values.

    ::

        p_ib = share of worker i's n_i values that have bit b set;  c_b = median_i p_ib
        z_ib = (p_ib - c_b) / sqrt(c_b (1 - c_b) (1 / n_i + 1 / median n))
        unlikely where |z_ib| > 8 max(1, s_i, s);  s_i^2 = median_b z_ib^2 / 0.4549, s^2 = median_ib z_ib^2 / 0.4549

    Values of many magnitudes begin with 1 more often than with larger digits (Benford's law), so that a flip shows even
    in the highest bit. s and s_i are above 1 if values depend on one another: a bit has to stand out from all workers'
    bits and, because colluders can make s small, from the worker's own. While fewer than half of the workers with 100
    values or more are faulty, c lies within the range of the sound ones. None unless more than half have that many.

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
    # At least that of a single value, for bits that are the same in all values.
    variance = (center * (1 - center)).clamp(min=1 / usual) * (1 / sizes + 1 / usual)
    squares = (shares - center).square() / variance
    # Bits that half precision does not have are 0 in all values.
    varied = torch.where((center > 0) & (center < 1), squares, torch.nan).tolist()
    of_all = known_median(chain.from_iterable(varied))
    usual_square = torch.tensor([[max(known_median(of_row), of_all)] for of_row in varied], dtype=torch.float64)
    spread = (usual_square / _MEDIAN_OF_SQUARES).nan_to_num(1.0).clamp(min=1)
    return (squares > _UNLIKELY**2 * spread).any(1)


class BitCount:
    """How often each mantissa bit is set in each worker's row, summed over ranks together with the first statistic.

    Args:
        matrix: the rows.
        wanted: whether to count.

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
        """Return a matrix whose first statistic is summed over ranks in one collective with the counts."""
        return matrix.completed_by(self._complete_both) if self._wanted else matrix

    def added_to(self, report: Report, workers: Tensor) -> Report:
        """Return the report with :attr:`~lightning_byzantine.aggregators.Report.unlikely` set.

        Args:
            report: on all workers.
            workers: indices of the workers to compare; the bits of others do not count as unlikely.

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
            # Here, because all blocks have arrived for the statistic.
            blocks = self._matrix.blocks
            num_columns = sum(block.shape[1] for block in blocks)
            counts = torch.stack([count_bits(block, num_columns) for block in blocks]).sum(0)
            sums = complete(torch.cat([total.flatten(), counts.flatten()]))
            self._counts = sums[total.numel() :].view(counts.shape)
            return sums[: total.numel()].view(total.shape)

        return completed
