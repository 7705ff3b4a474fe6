"""Short images of long vectors, from which inner products follow."""

from functools import lru_cache

import torch
from torch import Tensor

__all__ = ["PERIOD", "WIDTH", "fold", "sketches_of"]

# Numbers in a sketch, k: inner products of sketches are off by sqrt(2 / k) of the vectors' lengths.
WIDTH = 256
# Numbers in a folded vector, p, a multiple of k.
PERIOD = 2**12
# Sets of signs, by turns for so many neighbours, which fill a vector register: if all had the same signs, the errors of
# columns with equal values would not average out.
_SIGNS, _NEIGHBOURS = 8, 16


def fold(columns: Tensor, first: int, out: Tensor) -> None:
    """Add some columns of long vectors to the folded vectors, in one pass.

    ::

        (F x)_c = sum_j sign_j x_j  over all columns j with j mod p = c
        (S x)_b = sum_c sign_c (F x)_c  over all c with c mod k = b, see sketches_of

    ``<S x, S y>`` is on average ``<x, y>`` over the signs, with a standard deviation of about ``||x|| ||y|| sqrt(2 /
    k)``. Of vectors of at most k columns, it is exact. Columns that are the same vector p columns apart are the worst:
    they have one of eight sets of signs.

    Args:
        columns: [n, c], neighbouring columns of n vectors, float32 or float64.
        first: which column of the vectors the first of these is, at least 0.
        out: [n, p], to which their part is added.

    Source: Charikar, Chen & Farach-Colton, "Finding Frequent Items in Data Streams", ICALP 2002 (the count sketch).

    Example:
        >>> vectors = torch.randn(2, 9000, generator=torch.Generator().manual_seed(0))
        >>> vectors[1] += vectors[0]
        >>> folded = torch.zeros(2, PERIOD)
        >>> fold(vectors[:, :5000], 0, out=folded)
        >>> fold(vectors[:, 5000:], 5000, out=folded)
        >>> sketches = sketches_of(folded)
        >>> bool((sketches @ sketches.T - vectors @ vectors.T).abs().max() < 0.2 * vectors.square().sum(1).max())
        True

    """
    num_rows, num_columns, period = *columns.shape, out.shape[1]
    before = first // period
    signs = _signs(before, (first + num_columns - 1) // period + 1, columns.dtype, columns.device)
    head = min(-first % period, num_columns)
    num_whole = (num_columns - head) // period
    # Of fewer periods, the products would be larger than the columns.
    tail = head + (num_whole * period if num_whole >= _SIGNS else 0)
    if head < tail:
        # All columns with all signs, of which one eighth is of use: faster than one set of signs after the other.
        of_whole = signs[1 if head else 0 :][:num_whole].T.expand(num_rows, -1, -1)
        products = torch.bmm(of_whole, columns[:, head:tail].view(num_rows, num_whole, period))
        by_sets = -1, _SIGNS, _neighbours(period)
        own = products.view(num_rows, _SIGNS, *by_sets).diagonal(dim1=1, dim2=3)
        out.view(num_rows, *by_sets).permute(0, 1, 3, 2).add_(own)
    one_by_one = [(start, min(start + period, num_columns)) for start in range(tail, num_columns, period)]
    for start, stop in [(0, head), *one_by_one] if head else one_by_one:
        index, place = divmod(first + start, period)
        part = slice(place, place + stop - start)
        of_part = signs[index - before][_sets(period, columns.device)[part]]
        out[:, part].addcmul_(columns[:, start:stop], of_part)


def sketches_of(folded: Tensor) -> Tensor:
    """Return the sketches [n, k] of folded vectors [n, p]."""
    signs = _signs(0, folded.shape[1] // _SIGNS, folded.dtype, folded.device).flatten()
    return (folded * signs).view(len(folded), -1, WIDTH).sum(1)


def _neighbours(period: int) -> int:
    """Return how many neighbouring columns have the same sign."""
    return min(_NEIGHBOURS, period // _SIGNS)


@lru_cache
def _sets(period: int, device: torch.device) -> Tensor:
    """Return which of the eight signs each column in a period has, [p]."""
    return torch.arange(period, device=device) // _neighbours(period) % _SIGNS


@lru_cache(maxsize=2**12)
def _signs(start: int, stop: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Return eight signs for each of the numbers from ``start`` to ``stop``, [n, 8]: public, the same every time."""
    # The finalizer of MurmurHash3, in 32 bits of 64.
    hashed = torch.arange(start * _SIGNS, stop * _SIGNS, device=device)
    for shift, factor in ((16, 0x85EBCA6B), (13, 0xC2B2AE35), (16, 1)):
        hashed = ((hashed ^ (hashed >> shift)) * factor) & 0xFFFFFFFF
    return (1 - 2 * (hashed & 1)).to(dtype).view(-1, _SIGNS)
