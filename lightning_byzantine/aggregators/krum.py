"""The row with the nearest neighbours."""

from torch import Tensor

from lightning_byzantine.aggregators.aggregator import Aggregator
from lightning_byzantine.matrix import Point, WorkerMatrix
from lightning_byzantine.ordering import mean_of_nearest

__all__ = ["Krum", "krum_scores"]


class Krum(Aggregator):
    """The row with the least sum of squared distances to its m - f - 1 nearest others; ties go to the lower index.

    The original paper counts m - f - 2 neighbours; m - f - 1 works for any 2f < m.

    Source: Blanchard et al., "Machine Learning with Adversaries: Byzantine Tolerant Gradient Descent", NeurIPS 2017.

    Example:
        >>> import torch
        >>> Krum()(torch.tensor([[1.0], [1.5], [9.0], [2.5]]), num_byzantine=1)
        tensor([1.5000])

    """

    def locate(self, matrix: WorkerMatrix, num_byzantine: int) -> Point:
        """Return the row of the lowest score."""
        return matrix.combine(mean_of_nearest(krum_scores(matrix, num_byzantine), 1))


def krum_scores(matrix: WorkerMatrix, num_byzantine: int) -> Tensor:
    """Return each row's sum of squared distances to its m - f - 1 nearest others, [m]."""
    ascending = matrix.squared_distances().sort(dim=1).values
    # The first column is the row's distance to itself.
    return ascending[:, 1 : matrix.num_workers - num_byzantine].sum(dim=1)
