"""The mean of the rows with the smallest diameter."""

import torch
from torch import Tensor

from lightning_byzantine.aggregators.aggregator import Aggregator
from lightning_byzantine.aggregators.subsets import all_subsets, check_num_subsets
from lightning_byzantine.matrix import Point, WorkerMatrix, mean_of

__all__ = ["MinimumDiameterAveraging"]


class MinimumDiameterAveraging(Aggregator):
    """The mean of the m - f rows with the smallest diameter (MDA).

    S = argmin over all S with |S| = m - f of max_{i, j in S} ||x_i - x_j||; returns (1/|S|) sum_{i in S} x_i. Ties go
    to the subset that is first in lexicographic order, as in ByzFL and in ByzPy.

    Source: Rousseeuw, "Multivariate estimation with high breakdown point", 1985; El-Mhamdi et al., "Collaborative
    Learning in the Jungle", NeurIPS 2021.

    Example:
        >>> MinimumDiameterAveraging()(torch.tensor([[1.0], [9.0], [2.0], [3.0]]), num_byzantine=1)
        tensor([2.])

    """

    uses_products = True

    def check(self, num_workers: int, num_byzantine: int) -> None:
        """Raise :class:`ValueError` if there are too many subsets of m - f workers."""
        super().check(num_workers, num_byzantine)
        check_num_subsets("MinimumDiameterAveraging", num_workers, num_byzantine)

    def locate(self, matrix: WorkerMatrix, num_byzantine: int) -> Point:
        """Return the average of the subset with the smallest diameter."""
        subsets = all_subsets(matrix.num_workers, matrix.num_workers - num_byzantine)
        best = matrix.lowest(lambda squared: _squared_diameters(squared, subsets), 1)
        return matrix.combine(mean_of(subsets[best[0]], matrix.num_workers))


def _squared_diameters(squared: Tensor, subsets: Tensor) -> Tensor:
    # One column of the subsets at a time, to save memory.
    diameters = torch.zeros(len(subsets), dtype=squared.dtype)
    for column in subsets.T:
        torch.maximum(diameters, squared[column[:, None], subsets].amax(1), out=diameters)
    return diameters
