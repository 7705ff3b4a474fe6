"""The median of every coordinate."""

from torch import Tensor

from lightning_byzantine.aggregators.aggregator import Aggregator
from lightning_byzantine.matrix import WorkerMatrix
from lightning_byzantine.points import Point
from lightning_byzantine.selection import order_statistics

__all__ = ["CoordinateWiseMedian"]


class CoordinateWiseMedian(Aggregator):
    """[x]_k = median([x_1]_k, .., [x_m]_k); for even m the average of the middle two.

    Source: Yin et al., "Byzantine-Robust Distributed Learning: Towards Optimal Statistical Rates", ICML 2018.

    Example:
        >>> import torch
        >>> CoordinateWiseMedian()(torch.tensor([[1.0], [2.0], [4.0], [90.0]]), num_byzantine=1)
        tensor([3.])

    """

    def locate(self, matrix: WorkerMatrix, num_byzantine: int) -> Point:
        """Return the vector of medians."""
        return matrix.coordinatewise(_median)


def _median(rows: Tensor) -> Tensor:
    num_workers = len(rows)
    if num_workers % 2 == 1:
        return order_statistics(rows, [num_workers // 2])[0]
    low, high = order_statistics(rows, [num_workers // 2 - 1, num_workers // 2])
    return (low + high) / 2
