"""Points amid rows, to few digits, for many Gram matrices at once."""

import torch
from torch import Tensor

__all__ = ["distances_from", "middle_of", "middle_weights", "products_about", "smallest"]

# Iterations of Weiszfeld's: the point only has to be amid the rows.
_ITERATIONS = 8
# A distance below this fraction of the middle one is rounding error.
_LEAST = 1e-6


def middle_of(values: Tensor, among: Tensor) -> Tensor:
    """Return the lower medians of the chosen values, [s, 1].

    Args:
        values: [s, m].
        among: [s, m] bool, at least one in each row.

    Example:
        >>> middle_of(torch.tensor([[4.0, 1.0, 3.0, 9.0]]), among=torch.tensor([[True, True, True, False]]))
        tensor([[3.]])

    """
    return smallest(values, among, (among.sum(1, keepdim=True) + 1) // 2)


def smallest(values: Tensor, among: Tensor, count: Tensor) -> Tensor:
    """Return the ``count``-th smallest of the chosen values, [s, 1].

    Args:
        values: [s, m].
        among: [s, m] bool.
        count: [s, 1], from 1 to the number of chosen values.

    """
    return values.masked_fill(~among, torch.inf).sort(dim=1).values.gather(1, count - 1)


def middle_weights(products: Tensor, among: Tensor) -> Tensor:
    """Return the weights of about the geometric medians of the chosen rows, [s, m]: none is far from most of them.

    Args:
        products: [s, m, m] float64, inner products about a row amid the others.
        among: [s, m] bool.

    Example:
        >>> rows = torch.tensor([[0.0], [1.0], [2.0], [90.0]], dtype=torch.float64)
        >>> weights = middle_weights(rows @ rows.T[None], among=torch.ones(1, 4, dtype=torch.bool))
        >>> bool(weights @ rows < 2.1)
        True

    """
    squared = products.diagonal(dim1=1, dim2=2)
    middle = middle_of(squared, among)
    # Where most rows are equal, they are the median, and at the origin.
    are_at_origin = (squared == 0) & among
    # The row at the origin is as good as any near it.
    weights = among / squared.maximum(middle).sqrt()
    for _ in range(_ITERATIONS):
        weights = weights / weights.sum(1, keepdim=True)
        distances = distances_from(products, weights).maximum(_LEAST * middle.sqrt())
        weights = among / distances
    at_origin = are_at_origin / are_at_origin.sum(1, keepdim=True)
    return torch.where(middle > 0, weights / weights.sum(1, keepdim=True), at_origin)


def distances_from(products: Tensor, weights: Tensor) -> Tensor:
    """Return ||x_i - sum_j w_j x_j||, [s, m], from inner products [s, m, m] and weights [s, m]."""
    seen = (products @ weights[..., None])[..., 0]
    squared = products.diagonal(dim1=1, dim2=2) - 2 * seen + (seen * weights).sum(1, keepdim=True)
    return squared.clamp(min=0).sqrt()


def products_about(products: Tensor, weights: Tensor) -> Tensor:
    """Return inner products [s, m, m] about the points sum_i w_i x_i."""
    seen = products @ weights[..., None]
    halves = seen - weights[..., None, :] @ seen / 2
    # In place: with many workers, each matrix in between would take as long to fill as to compute.
    moved = halves + halves.mT
    return torch.sub(products, moved, out=moved)
