"""Robust summaries of one value that every rank reports, such as a buffer or a logged number."""

import torch
from torch import Tensor

__all__ = ["majority", "median", "order_statistic", "outvoted"]

_SORTABLE = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def median(reports: Tensor) -> Tensor:
    """Return the median of every coordinate; for even m the mean of the middle two. NaN counts as the largest value.

    With f < m / 2 wrong reports, NaN and infinities included, each coordinate lies between those of two correct ones.
    If all reports agree, the result is the same, bit for bit.

    Args:
        reports: [m, ..], of a floating-point dtype.

    Returns:
        [..], in the dtype of ``reports``.

    Example:
        >>> median(torch.tensor([[1.0, 5.0], [torch.nan, 5.0], [3.0, -torch.inf]]))
        tensor([3., 5.])

    """
    ordered = _ordered(reports)
    low, high = ordered[(len(ordered) - 1) // 2], ordered[len(ordered) // 2]
    # Halved before adding, so that the sum can't overflow; equal values are returned as they are, because half of a
    # subnormal number may be rounded.
    return torch.where(low == high, low, low / 2 + high / 2).to(reports.dtype)


def order_statistic(reports: Tensor, rank: int) -> Tensor:
    """Return the value at position ``rank`` of each sorted coordinate. NaN counts as the largest value.

    Args:
        reports: [m, ..], of a floating-point dtype.
        rank: in [-m, m); 0 is the smallest value, -1 the largest.

    Returns:
        [..], in the dtype of ``reports``.

    Example:
        >>> order_statistic(torch.tensor([[1.0], [torch.nan], [3.0]]), rank=-2)
        tensor([3.])

    """
    return _ordered(reports)[rank].to(reports.dtype)


def majority(reports: Tensor) -> Tensor:
    """Return the most frequent value of every coordinate; the smallest of several equally frequent ones.

    Args:
        reports: [m, ..], of any dtype; values are compared bit by bit.

    Returns:
        [..], in the dtype of ``reports``.

    Example:
        >>> majority(torch.tensor([[7, 1], [7, 2], [900, 3]]))
        tensor([7, 1])

    """
    values = reports.contiguous().view(_SORTABLE[reports.element_size()])
    ordered = values.sort(dim=0).values
    winner = ordered[0]
    for count in range(2, len(ordered) + 1):
        # In sorted order, a value is repeated `count` times where the first and the last of `count` values are equal.
        repeated = ordered[: len(ordered) - count + 1] == ordered[count - 1 :]
        first = repeated.to(torch.uint8).argmax(dim=0, keepdim=True)
        winner = torch.where(repeated.any(dim=0), ordered.gather(0, first)[0], winner)
    return winner.view(reports.dtype)


def outvoted(reports: Tensor) -> Tensor:
    """Return which reports are not finite in a coordinate where the majority is finite: [m] bool.

    Args:
        reports: [m, ..], of a floating-point dtype.

    Example:
        >>> outvoted(torch.tensor([[1.0, torch.nan], [torch.nan, 5.0], [3.0, torch.inf]]))
        tensor([False,  True, False])

    """
    finite = reports.isfinite()
    return ((2 * finite.sum(0) > len(reports)) & ~finite).flatten(1).any(1)


def _ordered(reports: Tensor) -> Tensor:
    return reports.to(torch.promote_types(reports.dtype, torch.float32)).sort(dim=0).values
