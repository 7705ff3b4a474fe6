"""Counts of bits that cost no collective of their own."""

from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor

from lightning_byzantine.aggregation.mantissas import count_bits, unlikely_bits
from lightning_byzantine.aggregators import Report
from lightning_byzantine.matrix import WorkerMatrix

__all__ = ["BitCount"]


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
