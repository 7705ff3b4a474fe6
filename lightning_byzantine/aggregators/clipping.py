"""Clipping of the rows' norms."""

import torch
from torch import Tensor

from lightning_byzantine.aggregators.aggregator import Aggregator
from lightning_byzantine.aggregators.meta_aggregator import MetaAggregator
from lightning_byzantine.matrix import Point, WorkerMatrix
from lightning_byzantine.utilities.checks import check_positive

__all__ = ["Clipping", "clipped"]


class Clipping(MetaAggregator):
    """The base rule, after rows longer than C are scaled down to norm C: x_i min(1, C / ||x_i||).

    Args:
        base: the rule to apply to the clipped rows.
        max_norm: C, in the units of the rows. The default, that of ByzFL and ByzPy, is for raw gradients of small
            networks.

    Source: Karimireddy, He & Jaggi, "Learning from History for Byzantine Robust Optimization", ICML 2021, section 4.

    Example:
        >>> from lightning_byzantine.aggregators import Mean
        >>> Clipping(Mean(), max_norm=5.0)(torch.tensor([[1.0, 0.0], [60.0, 80.0]]), num_byzantine=0)
        tensor([2., 2.])

    """

    def __init__(self, base: Aggregator, max_norm: float = 2.0) -> None:
        super().__init__(base)
        self.max_norm = check_positive("max_norm", max_norm)

    def locate(self, matrix: WorkerMatrix, num_byzantine: int) -> Point:
        """Return the base's result on the clipped rows."""
        return self.base.locate(clipped(matrix, matrix.squared_norms().sqrt(), self.max_norm), num_byzantine)


def clipped(matrix: WorkerMatrix, norms: Tensor, max_norm: float) -> WorkerMatrix:
    """Scale rows whose norm, of ``norms`` [m], exceeds ``max_norm`` down to it, lazily."""
    longer = norms > max_norm
    return matrix.scale(torch.where(longer, max_norm / norms, 1.0)) if longer.any() else matrix
