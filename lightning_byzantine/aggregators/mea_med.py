"""The mean around the median of every coordinate."""

from dataclasses import dataclass
from functools import reduce

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
        is_exact = rows.dtype == torch.float64
        choices = self._choices(values, TIE if is_exact else _DOUBT)
        is_tied = reduce(torch.logical_or, [tied for _, tied in choices], torch.zeros_like(values[0], dtype=torch.bool))
        doubtful = torch.empty(0, dtype=torch.long) if is_exact else is_tied.nonzero().flatten()
        settled = self(torch.stack([row[doubtful].double() for row in values])) if len(doubtful) else None
        kept = values[: self.count]
        for lowest, (is_nearer, tied) in enumerate(choices):
            below, above, last = values[lowest], values[lowest + self.count], kept[lowest % self.count]
            half = below / 2 + above / 2 if is_exact else None
            torch.where(is_nearer, above, last, out=last)
            if half is not None:
                torch.where(tied, half, last, out=last)
        mean = mean_of_rows(kept).double()
        if settled is not None:
            mean[doubtful] = settled
        return mean

    def _choices(self, values: list[Tensor], tie: float) -> list[tuple[Tensor, Tensor]]:
        """Return whether to move up from the first ``count`` of the sorted values, one by one.

        The nearest values are adjacent. A step replaces the lowest one by the next one above.

        Returns:
            For each step, whether the value above is nearer to the median, and whether both are almost as far: [c].

        """
        low, high = values[(len(values) - 1) // 2], values[len(values) // 2]
        gain, other = torch.empty_like(low), torch.empty_like(low)
        choices = []
        for below, above in zip(values, values[self.count :], strict=False):
            # The difference of the distances from (low + high) / 2, without the rounding of that.
            torch.sub(low, below, out=gain).sub_(torch.sub(above, high, out=other))
            # Their sum is above - below. Where they are almost equal, each is half of it.
            torch.sub(above, below, out=other).mul_(tie / 2)
            choices.append((gain > 0, gain.abs_() < other))
        return choices
