"""The mean around the median of every coordinate."""

from functools import reduce

import torch
from torch import Tensor

from lightning_byzantine.aggregators.aggregator import Aggregator
from lightning_byzantine.matrix import Point, WorkerMatrix
from lightning_byzantine.matrix.order_statistics import order_statistics

__all__ = ["MeaMed", "mean_around_median"]


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
        return matrix.coordinatewise(lambda rows: mean_around_median(rows, count))


def mean_around_median(rows: Tensor, count: int) -> Tensor:
    """Return, in every column, the mean of the ``count`` values nearest to the median.

    Args:
        rows: [m, c]; overwritten.
        count: at least 1 and at most m.

    Returns:
        [c].

    """
    num_rows = len(rows)
    values = order_statistics(rows, range(num_rows))
    median = (values[(num_rows - 1) // 2] + values[num_rows // 2]) / 2
    # The nearest values are adjacent in sorted order. Move up from the first ones while the next value is nearer.
    kept = values[:count]
    for lowest in range(num_rows - count):
        below, above = values[lowest], values[lowest + count]
        gain = (median - below) - (above - median)
        moved = torch.where(gain > 0, above, kept[lowest % count])
        kept[lowest % count] = torch.where(gain == 0, below / 2 + above / 2, moved)
    return reduce(torch.add, kept) / count
