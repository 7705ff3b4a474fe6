"""Tie-breaking for all rules."""

import torch
from torch import Tensor

__all__ = ["TIE", "is_decided", "mean_of", "nearest"]

# Equal distances differ by rounding, by a fraction of at most 1e-10 if they come from a Gram matrix, which depends on
# the column blocks. Anything this close counts as a tie, so that rounding never decides which worker is kept.
TIE = 1e-9


def nearest(distances: Tensor, count: int) -> Tensor:
    """Return the indices of the ``count`` smallest distances, ties broken by index.

    Two neighbours in sorted order are tied when they differ by less than 1e-9 of the larger one.

    Args:
        distances: [.., m], float64, non-negative.
        count: number of indices, at most m.

    Returns:
        [.., count]: exactly ``count`` indices, nearest first.

    Example:
        >>> nearest(torch.tensor([3.0, 1.0, 2.0, 1.0 + 1e-12], dtype=torch.float64), 2)
        tensor([1, 3])

    """
    ascending, order = distances.sort(dim=-1, stable=True)
    opens_group = torch.zeros_like(order)
    opens_group[..., 1:] = ascending.diff(dim=-1) > TIE * ascending[..., 1:]
    group = torch.empty_like(order).scatter_(-1, order, opens_group.cumsum(-1))
    return group.argsort(dim=-1, stable=True)[..., :count]


def is_decided(low: Tensor, high: Tensor, count: int) -> bool:
    """Return whether bounds on values are tight enough to know which ``count`` values are the smallest.

    Args:
        low: [.., n], lower bounds.
        high: [.., n], upper bounds.
        count: at most n.

    Example:
        >>> is_decided(torch.tensor([1.0, 2.0, 4.0]), torch.tensor([3.0, 3.0, 5.0]), count=2)
        True

    """
    order = (low + high).argsort()
    inside, outside = order[..., :count], order[..., count:]
    if outside.numel() == 0:
        return True
    return bool((high.gather(-1, inside).amax(-1) < low.gather(-1, outside).amin(-1)).all())


def mean_of(rows: Tensor, num_rows: int) -> Tensor:
    """Return the weights of the mean of some rows.

    Args:
        rows: [.., count], indices.
        num_rows: n.

    Returns:
        [.., n] float64.

    Example:
        >>> mean_of(torch.tensor([2, 1]), num_rows=3)
        tensor([0.0000, 0.5000, 0.5000], dtype=torch.float64)

    """
    weights = torch.zeros(*rows.shape[:-1], num_rows, dtype=torch.float64)
    return weights.scatter(-1, rows, 1 / rows.shape[-1])
