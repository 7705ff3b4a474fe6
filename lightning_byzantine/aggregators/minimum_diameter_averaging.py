"""The mean of the rows with the smallest diameter."""

import torch
from torch import Tensor

from lightning_byzantine.aggregators.subsets import BestSubset
from lightning_byzantine.matrix import WorkerMatrix

__all__ = ["MinimumDiameterAveraging"]


class MinimumDiameterAveraging(BestSubset):
    """The mean of the m - f rows with the smallest diameter (MDA).

    S = argmin over all S with |S| = m - f of max_{i, j in S} ||x_i - x_j||; returns (1/|S|) sum_{i in S} x_i. Ties go
    to the subset that is first in lexicographic order, as in ByzFL and in ByzPy.

    Source: Rousseeuw, "Multivariate estimation with high breakdown point", 1985; El-Mhamdi et al., "Collaborative
    Learning in the Jungle", NeurIPS 2021.

    Example:
        >>> MinimumDiameterAveraging()(torch.tensor([[1.0], [9.0], [2.0], [3.0]]), num_byzantine=1)
        tensor([2.])

    """

    def best(self, matrix: WorkerMatrix, subsets: Tensor) -> Tensor:
        """Return the index of the subset with the smallest diameter."""
        return matrix.lowest(lambda squared: _squared_diameters(squared, subsets), 1)


def _squared_diameters(squared: Tensor, subsets: Tensor) -> Tensor:
    # One column of the subsets at a time, to save memory.
    diameters = torch.zeros(len(subsets), dtype=squared.dtype)
    for column in subsets.T:
        torch.maximum(diameters, squared[column[:, None], subsets].amax(1), out=diameters)
    return diameters
