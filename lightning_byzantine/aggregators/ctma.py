"""Centered trimmed meta-aggregation."""

from lightning_byzantine.aggregators.meta_aggregator import MetaAggregator
from lightning_byzantine.matrix import Point, WorkerMatrix, mean_of

__all__ = ["CTMA"]


class CTMA(MetaAggregator):
    """The mean of the m - f rows nearest to the base rule's result.

    x0 = A(x_1, .., x_m); S = the m - f rows nearest to x0; returns (1/|S|) sum_{i in S} x_i. If A is
    (c, delta)-robust, CTMA(A) is O(delta (1 + c))-robust, which is the optimal order.

    Args:
        base: the rule A that gives the center.

    Source: Dahan & Levy, "Fault Tolerant ML: Efficient Meta-Aggregation and Synchronous Training", ICML 2024,
    section 3 (arXiv 2405.14759).

    Example:
        >>> import torch
        >>> from lightning_byzantine.aggregators import CoordinateWiseMedian
        >>> CTMA(CoordinateWiseMedian())(torch.tensor([[1.0], [2.0], [6.0], [90.0]]), num_byzantine=1)
        tensor([3.])

    """

    def locate(self, matrix: WorkerMatrix, num_byzantine: int) -> Point:
        """Return the average of the rows nearest to the base's result."""
        center = self.base.locate(matrix, num_byzantine)
        kept = matrix.nearest(center, matrix.num_workers - num_byzantine)
        return matrix.combine(mean_of(kept, matrix.num_workers))
