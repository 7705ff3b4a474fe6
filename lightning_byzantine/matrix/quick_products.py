"""Inner products in float32 arithmetic, with bounds of their errors."""

from collections.abc import Iterator
from contextlib import contextmanager
from itertools import combinations_with_replacement
from typing import Any

import torch
from torch import Tensor

from lightning_byzantine.matrix.gram import ROUNDING, Gram

__all__ = ["all_digits", "quick_gram", "quick_products", "rounding_of_exact"]

# Columns that are multiplied and summed up in float32 at a time.
_PIECE = 4096
# Rows that are multiplied by as many others at a time, unless there are too many for such small products.
_TILE, _MANY_ROWS = 8, 64
# Four times the rounding of float32.
_ROUNDING_OF_PIECES = 4 * 2.0**-24
# Largest error of a product by underflow.
_TINY = 2.0**-126


def quick_products(rows: Tensor) -> Tensor:
    """Return inner products in float32 arithmetic, and the sums that bound their errors.

    4096 columns at a time are multiplied and summed in float32; these sums are added up in float64. Call it within
    :func:`all_digits`.

    Args:
        rows: [m, c] float32. Non-finite rows only affect their own products.

    Returns:
        [2, m, m] float64: the products, and the sums over all pieces of ||x_i||^2 ||x_j||^2. Both may be summed over
        blocks and ranks, for :func:`quick_gram`.

    Example:
        >>> quick_products(torch.tensor([[1.0, 2.0], [0.0, 3.0]]))[0]
        tensor([[5., 6.],
                [6., 9.]], dtype=torch.float64)

    """
    num_columns = rows.shape[1]
    whole = num_columns // _PIECE * _PIECE
    parts = []
    if whole:
        parts.append(_products(rows[:, :whole].reshape(len(rows), -1, _PIECE).transpose(0, 1)))
    if whole < num_columns or not parts:
        parts.append(_products(rows[None, :, whole:]))
    products = torch.cat(parts) if len(parts) > 1 else parts[0]
    norms = products.diagonal(dim1=1, dim2=2).double()
    return torch.stack([products.sum(0, dtype=torch.float64), norms.T @ norms])


def quick_gram(sums: Tensor, num_columns: int) -> Gram:
    """Return the Gram matrix about 0 from the sums of :func:`quick_products` over all columns.

    Rounding errors of the pieces are independent, so they add up to the root of the sum of their squares.

    Args:
        sums: [2, m, m].
        num_columns: upper bound of their number; in each, a product may have underflowed.

    """
    products, squares = sums
    return Gram(products, _ROUNDING_OF_PIECES * squares.sqrt() + _TINY * num_columns)


def rounding_of_exact(products: Tensor) -> Tensor:
    """Return what bounds the errors of products in float64, in the unit of :func:`quick_products`.

    Args:
        products: [.., m, m] float64.

    Returns:
        The same shape.

    """
    norms = products.diagonal(dim1=-2, dim2=-1) * (ROUNDING / _ROUNDING_OF_PIECES)
    return norms[..., None] * norms[..., None, :]


@contextmanager
def all_digits(device: str) -> Iterator[None]:
    """Disable autocast and `torch.set_float32_matmul_precision`, which would round factors to three digits.

    Args:
        device: type of the device, "cpu" or "cuda".

    """
    backend: Any = torch.backends.cuda if device == "cuda" else torch.backends.mkldnn
    setting = backend.matmul.fp32_precision
    backend.matmul.fp32_precision = "ieee"
    try:
        with torch.autocast(device, enabled=False):
            yield
    finally:
        backend.matmul.fp32_precision = setting


def _products(pieces: Tensor) -> Tensor:
    """Return the inner products of all rows within each piece: [n, m, c] to [n, m, m]."""
    num_rows = pieces.shape[1]
    if pieces.device.type != "cpu" or num_rows <= _TILE or num_rows > _MANY_ROWS:
        return torch.bmm(pieces, pieces.mT)
    # On CPUs, the product of more rows at once takes several times as long; and of two equal halves, one is saved.
    products = pieces.new_empty(len(pieces), num_rows, num_rows)
    tiles = [slice(start, start + _TILE) for start in range(0, num_rows, _TILE)]
    for row, column in combinations_with_replacement(tiles, 2):
        tile = torch.bmm(pieces[:, row], pieces[:, column].mT)
        products[:, row, column] = tile
        products[:, column, row] = tile.mT
    return products
