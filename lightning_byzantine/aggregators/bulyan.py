"""The mean around the median of rows chosen by Krum."""

import torch
from torch import Tensor

from lightning_byzantine.aggregators.aggregator import Aggregator
from lightning_byzantine.aggregators.krum import krum_scores
from lightning_byzantine.aggregators.mea_med import mean_around_median
from lightning_byzantine.matrix import Point, WorkerMatrix

__all__ = ["Bulyan"]


class Bulyan(Aggregator):
    """Krum chooses m - 2f rows; in every coordinate, the mean of the m - 4f of their values nearest to their median.

    Rows are chosen one by one: Krum picks each from the n rows left, by their n - f - 1 nearest others (the paper:
    n - f - 2). The second phase removes attacks on a single coordinate, which distances hardly show. Needs
    m >= 4f + 3, or f = 0, where it is the mean.

    Source: El Mhamdi, Guerraoui & Rouault, "The Hidden Vulnerability of Distributed Learning in Byzantium", ICML 2018.

    Example:
        >>> Bulyan()(torch.tensor([[1.0], [2.0], [3.0], [4.0], [5.0], [6.0], [90.0]]), num_byzantine=1)
        tensor([3.])

    """

    uses_products = True

    def check(self, num_workers: int, num_byzantine: int) -> None:
        """Raise :class:`ValueError` unless m >= 4f + 3 or f = 0."""
        super().check(num_workers, num_byzantine)
        if num_byzantine > 0 and num_workers < 4 * num_byzantine + 3:
            raise ValueError(
                f"Bulyan needs m >= 4f + 3 workers, got m={num_workers} with f={num_byzantine},"
                f" for which m must be at least {4 * num_byzantine + 3}"
            )

    def locate(self, matrix: WorkerMatrix, num_byzantine: int) -> Point:
        """Return the vector of means of the chosen rows."""
        left = torch.arange(matrix.num_workers)

        def scores(squared: Tensor) -> Tensor:
            return krum_scores(squared[left][:, left], num_byzantine)

        chosen = []
        for _ in range(matrix.num_workers - 2 * num_byzantine):
            best = matrix.lowest(scores, 1)
            chosen.append(int(left[best]))
            left = left[torch.arange(len(left)) != best]
        count = matrix.num_workers - 4 * num_byzantine
        return matrix.select(torch.tensor(sorted(chosen))).coordinatewise(lambda rows: mean_around_median(rows, count))
