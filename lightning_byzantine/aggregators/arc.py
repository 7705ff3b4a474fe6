"""Adaptive clipping of the rows' norms."""

from lightning_byzantine.aggregators.clipping import clipped
from lightning_byzantine.aggregators.meta_aggregator import MetaAggregator
from lightning_byzantine.matrix import Point, WorkerMatrix

__all__ = ["ARC"]


class ARC(MetaAggregator):
    """Adaptive robust clipping: the base rule, after the k longest rows are scaled down to the next norm.

    k = floor(2 (f / m) (m - f)); x_i min(1, C / ||x_i||), where C is the (k + 1)-th largest norm.

    Args:
        base: the rule to apply to the clipped rows.

    Source: Allouah et al., "The Vital Role of Gradient Clipping in Byzantine-Resilient Distributed Learning", 2024
    (arXiv 2405.14432).

    Example:
        >>> import torch
        >>> from lightning_byzantine.aggregators import Mean
        >>> ARC(Mean())(torch.tensor([[1.0], [2.0], [90.0]]), num_byzantine=1)
        tensor([1.6667])

    """

    def locate(self, matrix: WorkerMatrix, num_byzantine: int) -> Point:
        """Return the base's result on the clipped rows."""
        norms = matrix.squared_norms().sqrt()
        num_clipped = 2 * num_byzantine * (len(norms) - num_byzantine) // len(norms)
        threshold = norms.sort(descending=True).values[num_clipped]
        return self.base.locate(clipped(matrix, norms, float(threshold)), num_byzantine)
