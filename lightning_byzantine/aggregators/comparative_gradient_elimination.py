"""The mean of the shortest rows."""

from lightning_byzantine.aggregators.aggregator import Aggregator
from lightning_byzantine.matrix import Point, WorkerMatrix, mean_of, nearest

__all__ = ["ComparativeGradientElimination"]


class ComparativeGradientElimination(Aggregator):
    """The mean of the m - f rows with the smallest norms (CGE); ties go to the lower index.

    The paper takes their sum. Directions don't count: a Byzantine row of ordinary length is kept wherever it points,
    and so is a row of zeros.

    Source: Gupta, Liu & Vaidya, "Byzantine Fault-Tolerant Distributed Machine Learning with Norm-Based Comparative
    Gradient Elimination", DSN-W 2021 (arXiv 2008.04699).

    Example:
        >>> import torch
        >>> ComparativeGradientElimination()(torch.tensor([[1.0], [-9.0], [3.0]]), num_byzantine=1)
        tensor([2.])

    """

    def locate(self, matrix: WorkerMatrix, num_byzantine: int) -> Point:
        """Return the average of the shortest rows."""
        kept = nearest(matrix.squared_norms().sqrt(), matrix.num_workers - num_byzantine)
        return matrix.combine(mean_of(kept, matrix.num_workers))
