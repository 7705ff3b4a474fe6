"""The base class of rules that search all subsets of m - f workers."""

from abc import ABC, abstractmethod
from itertools import combinations
from math import comb

import torch
from torch import Tensor

from lightning_byzantine.aggregators.aggregator import Aggregator
from lightning_byzantine.matrix import Point, WorkerMatrix, mean_of

__all__ = ["BestSubset"]

# The eigenvalues of so many small matrices take about a second on one core.
_MOST_SUBSETS = 100_000


class BestSubset(Aggregator, ABC):
    """The mean of the best of all subsets of m - f rows.

    Example:
        >>> class FirstRows(BestSubset):
        ...     def best(self, matrix: WorkerMatrix, subsets: Tensor) -> Tensor:
        ...         return torch.tensor([0])
        >>> FirstRows()(torch.tensor([[1.0], [2.0], [90.0]]), num_byzantine=1)
        tensor([1.5000])
        >>> FirstRows().check(num_workers=33, num_byzantine=10)
        Traceback (most recent call last):
        ...
        ValueError: FirstRows looks at all subsets of m - f workers, of which there may be 100,000 at most, got \
92,561,040 with m=33 workers and f=10

    """

    uses_products = True

    @abstractmethod
    def best(self, matrix: WorkerMatrix, subsets: Tensor) -> Tensor:
        """Return the index of the best subset, [1].

        Args:
            matrix: m rows.
            subsets: [n, m - f], all subsets of [0, m) of this size, in lexicographic order.

        """

    def check(self, num_workers: int, num_byzantine: int) -> None:
        """Raise :class:`ValueError` if there are too many subsets of m - f workers to search in every step."""
        super().check(num_workers, num_byzantine)
        count = comb(num_workers, num_byzantine)
        if count > _MOST_SUBSETS:
            raise ValueError(
                f"{type(self).__name__} looks at all subsets of m - f workers, of which there may be {_MOST_SUBSETS:,}"
                f" at most, got {count:,} with m={num_workers} workers and f={num_byzantine}"
            )

    def locate(self, matrix: WorkerMatrix, num_byzantine: int) -> Point:
        """Return the average of the best subset."""
        subsets = torch.tensor(list(combinations(range(matrix.num_workers), matrix.num_workers - num_byzantine)))
        return matrix.combine(mean_of(subsets[self.best(matrix, subsets)[0]], matrix.num_workers))
