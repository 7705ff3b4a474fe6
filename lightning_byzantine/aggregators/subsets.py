"""All subsets of m - f workers, for rules that search through them."""

from itertools import combinations
from math import comb

import torch
from torch import Tensor

__all__ = ["all_subsets", "check_num_subsets"]

# The eigenvalues of so many small matrices take about a second on one core.
_MOST_SUBSETS = 100_000


def check_num_subsets(rule: str, num_workers: int, num_byzantine: int) -> None:
    """Raise :class:`ValueError` if there are too many subsets of m - f workers to search in every step.

    Example:
        >>> check_num_subsets("SMEA", num_workers=33, num_byzantine=10)
        Traceback (most recent call last):
        ...
        ValueError: SMEA looks at all subsets of m - f workers, of which there may be 100,000 at most, got 92,561,040 \
with m=33 workers and f=10

    """
    count = comb(num_workers, num_byzantine)
    if count > _MOST_SUBSETS:
        raise ValueError(
            f"{rule} looks at all subsets of m - f workers, of which there may be {_MOST_SUBSETS:,} at most,"
            f" got {count:,} with m={num_workers} workers and f={num_byzantine}"
        )


def all_subsets(num_workers: int, size: int) -> Tensor:
    """Return the subsets of [0, m) with ``size`` elements, [n, size], in lexicographic order.

    Example:
        >>> all_subsets(3, size=2)
        tensor([[0, 1],
                [0, 2],
                [1, 2]])

    """
    return torch.tensor(list(combinations(range(num_workers), size)))
