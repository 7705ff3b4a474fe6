"""The row with the nearest neighbours."""

from torch import Tensor

from lightning_byzantine.aggregators.aggregator import Aggregator
from lightning_byzantine.matrix import Point, WorkerMatrix, mean_of

__all__ = ["Krum", "best_scored", "krum_scores"]


class Krum(Aggregator):
    """The row with the least sum of squared distances to its m - f - 1 nearest others; ties go to the lower index.

    The original paper counts m - f - 2 neighbours; m - f - 1 works for any 2f < m.

    Source: Blanchard et al., "Machine Learning with Adversaries: Byzantine Tolerant Gradient Descent", NeurIPS 2017.

    Example:
        >>> import torch
        >>> Krum()(torch.tensor([[1.0], [1.5], [9.0], [2.5]]), num_byzantine=1)
        tensor([1.5000])

    """

    uses_products = True

    def locate(self, matrix: WorkerMatrix, num_byzantine: int) -> Point:
        """Return the row with the lowest score."""
        return matrix.combine(mean_of(best_scored(matrix, num_byzantine, 1), matrix.num_workers))


def best_scored(matrix: WorkerMatrix, num_byzantine: int, count: int) -> Tensor:
    """Return the indices of the rows with the lowest :func:`krum_scores`, [count]."""
    return matrix.lowest(lambda squared: krum_scores(squared, num_byzantine), count)


def krum_scores(squared: Tensor, num_byzantine: int) -> Tensor:
    """Return the sum of each row's squared distances, of [m, m], to its m - f - 1 nearest others, [m]."""
    # The first column is the row's distance to itself.
    return squared.sort(dim=1).values[:, 1 : len(squared) - num_byzantine].sum(dim=1)
