"""Distances from inner products, with all their digits."""

from collections.abc import Callable

from torch import Tensor

__all__ = ["centred_gram", "squared_distances"]

# A squared distance below this part of the squared norms it is the difference of has lost too many of their 16 digits.
_LOST = 1e-6
# Below this part it is rounding alone.
_ROUNDING = 1e-13


def centred_gram(gram: Callable[[int | None], Tensor]) -> Tensor:
    """Return the inner products of rows as seen from one of them, or from 0 where that is accurate already.

    ||x_i||^2 + ||x_j||^2 - 2 x_i.x_j loses all digits when rows share an offset far larger than their spread, and
    momentum makes that normal. Only then the origin moves, to a row that at least half of the rows are near to, so that
    nobody can choose it far from the honest rows. Every product involves its own two rows and the origin alone: no
    other row can take digits from it, which a mean as the origin would allow.

    Args:
        gram: computes (x_i - o).(x_j - o), [m, m] float64, where o is the row of that index, or 0 for None. Costs
            one pass over the columns.

    Example:
        >>> import torch
        >>> rows = 1e9 + torch.tensor([[0.0], [1.0], [3.0]], dtype=torch.float64)
        >>> def gram(origin: int | None) -> Tensor:
        ...     seen = rows if origin is None else rows - rows[origin]
        ...     return seen @ seen.T
        >>> squared_distances(centred_gram(gram))
        tensor([[0., 1., 9.],
                [1., 0., 4.],
                [9., 4., 0.]], dtype=torch.float64)

    """
    origin: int | None = None
    products = gram(origin)
    for _ in range(2):
        if not _lost_digits(products):
            break
        central = _most_central_row(squared_distances(products))
        if central == origin:
            break
        origin = central
        products = gram(origin)
    return products


def squared_distances(gram: Tensor) -> Tensor:
    """Return ||x_i - x_j||^2, [m, m], from inner products about any origin.

    A squared distance below 1e-13 of the squared norms, seen from that origin, counts as 0.

    Example:
        >>> import torch
        >>> squared_distances(torch.tensor([[1.0, 0.0], [0.0, 4.0]]))
        tensor([[0., 5.],
                [5., 0.]])

    """
    norms = gram.diagonal()
    sums = norms + norms[:, None]
    squared = sums - 2 * gram
    # Colluders' copies must tie exactly.
    squared[squared <= _ROUNDING * sums] = 0
    return squared.fill_diagonal_(0)


def _lost_digits(gram: Tensor) -> bool:
    norms = gram.diagonal()
    sums = norms + norms[:, None]
    close = sums - 2 * gram < _LOST * sums
    return bool(close.fill_diagonal_(False).any())


def _most_central_row(distances: Tensor) -> int:
    """Return the row with the nearest majority: it is within two honest diameters of every honest row."""
    majority = distances.shape[0] // 2
    return int(distances.kthvalue(majority + 1, dim=1).values.argmin())
