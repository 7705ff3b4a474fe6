"""Counts of bits that cost no collective of their own."""

from collections.abc import Callable

import torch
from torch import Tensor

from lightning_byzantine.aggregation.mantissas import count_bits, unlikely_bits
from lightning_byzantine.matrix import WorkerMatrix

__all__ = ["BitCount"]


class BitCount:
    """How often each mantissa bit is set in each worker's row, summed over ranks along with the first statistic.

    Args:
        matrix: the rows.

    Example:
        >>> matrix = WorkerMatrix([torch.randn(3, 500, generator=torch.Generator().manual_seed(0))])
        >>> bits = BitCount(matrix)
        >>> norms = matrix.completed_by(bits.along_with).squared_norms()
        >>> bits.unlikely(torch.arange(3))
        tensor([False, False, False])

    """

    def __init__(self, matrix: WorkerMatrix) -> None:
        self._matrix = matrix
        self._counts: Tensor | None = None

    def along_with(self, complete: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
        """Return what sums a statistic over ranks as ``complete`` does, and the first time the counts as well."""

        def complete_both(total: Tensor) -> Tensor:
            if self._counts is not None:
                return complete(total)
            # Here and not before, for by now all blocks have arrived.
            blocks = self._matrix.blocks
            num_columns = sum(block.shape[1] for block in blocks)
            counts = torch.stack([count_bits(block, num_columns) for block in blocks]).sum(0)
            sums = complete(torch.cat([total.flatten(), counts.flatten()]))
            self._counts = sums[total.numel() :].view(counts.shape)
            return sums[: total.numel()].view(total.shape)

        return complete_both

    def unlikely(self, workers: Tensor) -> Tensor | None:
        """Return whose values have bits unlike the others', [m] bool; None if none were counted, or too few.

        Args:
            workers: indices of those to compare; the others' are not called unlikely.

        """
        unlikely = None if self._counts is None else unlikely_bits(self._counts.cpu()[workers])
        if unlikely is None:
            return None
        everybody = torch.zeros(self._matrix.num_workers, dtype=torch.bool)
        everybody[workers] = unlikely
        return everybody
