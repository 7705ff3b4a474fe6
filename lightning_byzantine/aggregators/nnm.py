"""Nearest-neighbour mixing."""

from lightning_byzantine.aggregators.meta_aggregator import MetaAggregator
from lightning_byzantine.matrix import Point, WorkerMatrix, mean_of

__all__ = ["NNM"]


class NNM(MetaAggregator):
    """The base rule, after each row is replaced by the mean of the m - f rows nearest to it, itself included.

    Args:
        base: the rule to apply to the mixed rows.

    Source: Allouah et al., "Fixing by Mixing: A Recipe for Optimal Byzantine ML under Heterogeneity", AISTATS 2023.

    Example:
        >>> import torch
        >>> from lightning_byzantine.aggregators import CoordinateWiseMedian
        >>> NNM(CoordinateWiseMedian())(torch.tensor([[1.0], [2.0], [90.0]]), num_byzantine=1)
        tensor([1.5000])

    """

    uses_products = True

    def locate(self, matrix: WorkerMatrix, num_byzantine: int) -> Point:
        """Return the base's result on the mixed rows."""
        neighbours = matrix.lowest(lambda squared: squared, matrix.num_workers - num_byzantine)
        return self.base.locate(matrix.mix(mean_of(neighbours, matrix.num_workers)), num_byzantine)
