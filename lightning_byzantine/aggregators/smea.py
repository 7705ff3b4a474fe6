"""The mean of the rows with the smallest maximum variance."""

import torch
from torch import Tensor

from lightning_byzantine.aggregators.subsets import BestSubset
from lightning_byzantine.matrix import WorkerMatrix, nearest

__all__ = ["SMEA"]

# Number of subsets whose eigenvalues are computed at a time.
_BATCH = 4096


class SMEA(BestSubset):
    """Smallest maximum eigenvalue averaging: the mean of the m - f rows with the smallest maximum variance.

    S = argmin over all S with |S| = m - f of lambda_max(1/|S| sum_{i in S} (x_i - x_S) (x_i - x_S)^T), where x_S is the
    mean of S; returns x_S. Ties go to the subset that is first in lexicographic order. Eigenvalues are exact, from
    inner products, as in ByzPy; ByzFL estimates each by one step of the power method from a random vector, so its
    choice is random unless the rows are collinear.

    Source: Allouah et al., "On the Privacy-Robustness-Utility Trilemma in Distributed Learning", ICML 2023.

    Example:
        >>> SMEA()(torch.tensor([[1.0, 0.0], [0.0, 1.0], [1.0, 1.0], [9.0, 9.0]]), num_byzantine=1)
        tensor([0.6667, 0.6667])

    """

    def best(self, matrix: WorkerMatrix, subsets: Tensor) -> Tensor:
        """Return the index of the subset with the smallest maximum eigenvalue."""
        squared = matrix.exact_squared_distances()
        spreads = torch.cat([_spreads(squared, batch) for batch in torch.split(subsets, _BATCH)])
        return nearest(spreads, 1)


def _spreads(squared: Tensor, subsets: Tensor) -> Tensor:
    """Return the root of the largest eigenvalue of each subset's covariance, times its size: [n]."""
    chosen = squared[subsets[:, :, None], subsets[:, None, :]]
    # Each subset in its own units: a row of 1e149 would overflow, and make the others vanish.
    units = chosen.amax((1, 2)).clamp(min=torch.finfo(torch.float64).tiny)
    chosen = chosen / units[:, None, None]
    # Inner products about the mean, from distances: -1/2 (I - 11^T / k) D (I - 11^T / k).
    means = chosen.mean(1)
    products = (means[:, :, None] + means[:, None, :] - means.mean(1)[:, None, None] - chosen) / 2
    eigenvalues: Tensor = torch.linalg.eigvalsh(products)
    return eigenvalues[:, -1].clamp(min=0).mul(units).sqrt()
