"""The mean around the median of every coordinate."""

from dataclasses import dataclass

import torch
from torch import Tensor

from lightning_byzantine.aggregators.aggregator import Aggregator
from lightning_byzantine.matrix import Point, WorkerMatrix
from lightning_byzantine.matrix.column_function import ColumnFunction
from lightning_byzantine.matrix.order_statistics import mean_of_rows, order_statistics
from lightning_byzantine.matrix.ties import TIE

__all__ = ["MeaMed", "MeanAroundMedian"]

# Distances of float32 that differ by less than this fraction of the larger one are compared in float64.
_DOUBT = 1e-6


class MeaMed(Aggregator):
    """In every coordinate, the mean of the m - f values nearest to the median.

    For even m the median is the mean of the middle two, as in ByzFL; ByzPy takes the lower of them. If two values are
    equally far below and above the median, and only one of them is needed, each counts half, so that neither the sign
    nor the order of workers matters.

    Source: Xie, Koyejo & Gupta, "Generalized Byzantine-tolerant SGD", 2018 (arXiv 1802.10116).

    Example:
        >>> MeaMed()(torch.tensor([[-90.0], [2.0], [4.0], [6.0], [90.0]]), num_byzantine=2)
        tensor([4.])

    """

    def locate(self, matrix: WorkerMatrix, num_byzantine: int) -> Point:
        """Return the vector of means."""
        count = matrix.num_workers - num_byzantine
        return matrix.coordinatewise(MeanAroundMedian(count))


@dataclass(frozen=True)
class MeanAroundMedian(ColumnFunction):
    """In every column, the mean of the ``count`` values nearest to the median.

    Args:
        count: at least 1 and at most the number of rows.

    Example:
        >>> MeanAroundMedian(2)(torch.tensor([[1.0], [2.0], [4.0], [90.0]]))
        tensor([3.], dtype=torch.float64)

    """

    count: int

    jumps = True

    def __call__(self, rows: Tensor) -> Tensor:
        """Map m rows [m, c], which are overwritten, to [c] in float64."""
        values = order_statistics(rows, range(len(rows)))
        if rows.dtype == torch.float64:
            return self._of_sorted(values, TIE)[0]
        mean, is_close = self._of_sorted(values, _DOUBT)
        columns = is_close.nonzero().flatten()
        if len(columns):
            mean[columns] = self._of_sorted([row[columns].double() for row in values], TIE)[0]
        return mean

    def _of_sorted(self, values: list[Tensor], tie: float) -> tuple[Tensor, Tensor]:
        """Return the means, and where a distance from below and one from above are equal but for ``tie``."""
        num_rows = len(values)
        low, high = values[(num_rows - 1) // 2], values[num_rows // 2]
        is_tied = torch.zeros_like(low, dtype=torch.bool)
        # The nearest values are adjacent in sorted order. Move up from the first ones while the next value is nearer.
        kept = values[: self.count]
        for lowest in range(num_rows - self.count):
            below, above = values[lowest], values[lowest + self.count]
            # Twice the distances from the median (low + high) / 2, without its rounding.
            down, up = (low - below) + (high - below), (above - low) + (above - high)
            ties = (down - up).abs() < tie * torch.maximum(down, up)
            nearer = torch.where(up < down, above, kept[lowest % self.count])
            kept[lowest % self.count] = torch.where(ties, below / 2 + above / 2, nearer)
            is_tied |= ties
        return mean_of_rows([row.double() for row in kept]), is_tied
