"""How ties are broken, once for all rules."""

import torch
from torch import Tensor

__all__ = ["mean_of_nearest", "nearest"]

# Distances that should be equal differ by rounding, 1e-10 of them at worst where they come from a Gram matrix, and
# depending on how columns are cut into blocks. Anything this close counts as a tie, so that rounding never decides
# which worker is kept.
_TIE = 1e-9


def nearest(distances: Tensor, count: int) -> Tensor:
    """Return the indices of the ``count`` smallest distances, ties broken by index.

    Two neighbours in sorted order are tied when they differ by less than 1e-9 of the larger one.

    Args:
        distances: [m], float64, non-negative.
        count: how many to keep, at most m.

    Returns:
        Exactly ``count`` indices, nearest first.

    Example:
        >>> nearest(torch.tensor([3.0, 1.0, 2.0, 1.0 + 1e-12], dtype=torch.float64), 2)
        tensor([1, 3])

    """
    ascending, order = distances.sort(stable=True)
    opens_group = torch.zeros_like(order)
    opens_group[1:] = ascending.diff() > _TIE * ascending[1:]
    group = torch.empty_like(order)
    group[order] = opens_group.cumsum(0)
    return group.argsort(stable=True)[:count]


def mean_of_nearest(distances: Tensor, count: int) -> Tensor:
    """Return the weights [m] of the mean of the ``count`` rows that :func:`nearest` chooses.

    Example:
        >>> mean_of_nearest(torch.tensor([3.0, 1.0, 2.0], dtype=torch.float64), 2)
        tensor([0.0000, 0.5000, 0.5000], dtype=torch.float64)

    """
    weights = torch.zeros(len(distances), dtype=torch.float64)
    weights[nearest(distances, count)] = 1 / count
    return weights
