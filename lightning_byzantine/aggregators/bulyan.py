"""The mean around the median of rows chosen by Krum."""

import torch

from lightning_byzantine.aggregators.aggregator import Aggregator
from lightning_byzantine.aggregators.krum import krum_scores
from lightning_byzantine.aggregators.mea_med import MeanAroundMedian
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
        is_left = torch.ones(matrix.num_workers, dtype=torch.bool)
        for _ in range(matrix.num_workers - 2 * num_byzantine):
            best = matrix.lowest(lambda squared: krum_scores(squared[is_left][:, is_left], num_byzantine), 1)
            is_left[is_left.nonzero()[best]] = False
        chosen = matrix.select((~is_left).nonzero().flatten())
        count = matrix.num_workers - 4 * num_byzantine
        return chosen.coordinatewise(MeanAroundMedian(count))
