"""Order statistics of every column, by a network of minima and maxima."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cache, reduce

import torch
from torch import Tensor

__all__ = ["MeanOfRanks", "order_statistics"]


@dataclass(frozen=True)
class MeanOfRanks:
    """The mean, in every column, of the values that would stand at some ranks if the column was sorted.

    Args:
        ranks: in [0, m); 0 is the smallest value.

    Example:
        >>> MeanOfRanks((1, 2))(torch.tensor([[3.0], [1.0], [2.0], [90.0]]))
        tensor([2.5000])

    """

    ranks: tuple[int, ...]

    def __call__(self, rows: Tensor) -> Tensor:
        """Map m rows, [m, c], which are overwritten, to [c]."""
        return self._mean(order_statistics(rows, self.ranks))

    def unrolled(self, rows: Sequence[Tensor]) -> Tensor:
        """Return the same without writing to anything: for a compiler, which keeps all values in registers."""
        values = list(rows)
        for low, high, keeps_low, keeps_high in _network(len(values), self.ranks):
            first, second = values[low], values[high]
            if keeps_low:
                values[low] = torch.minimum(first, second)
            if keeps_high:
                values[high] = torch.maximum(first, second)
        return self._mean([values[rank] for rank in self.ranks])

    def _mean(self, values: list[Tensor]) -> Tensor:
        # Row by row, so that a coordinate's result does not depend on where its chunk was cut.
        return reduce(torch.add, values) / len(values) if len(values) > 1 else values[0]


def order_statistics(rows: Tensor, ranks: Sequence[int]) -> list[Tensor]:
    """Return the values that would stand at ``ranks`` if every column was sorted.

    A sorting network on whole rows, without the comparisons that the ranks asked for don't depend on: as many
    operations for any values, each of them vectorised, where sorting along columns goes from one value to the next.

    Args:
        rows: [m, c] without NaN; overwritten, so that everything happens in the same few rows of the cache.
        ranks: in [0, m); 0 is the smallest value.

    Returns:
        One [c] tensor for each rank.

    Source: Batcher's merge exchange, Knuth, The Art of Computer Programming, volume 3, section 5.2.2, algorithm M.

    Example:
        >>> order_statistics(torch.tensor([[3.0, 1.0], [1.0, 5.0], [2.0, 4.0]]), ranks=[1, 2])
        [tensor([2., 4.]), tensor([3., 5.])]

    """
    values = list(rows.unbind())
    spare = torch.empty_like(values[0])
    for low, high, keeps_low, keeps_high in _network(len(values), tuple(ranks)):
        first, second = values[low], values[high]
        if keeps_low and keeps_high:
            torch.minimum(first, second, out=spare)
            torch.maximum(first, second, out=second)
            values[low], spare = spare, first
        elif keeps_low:
            torch.minimum(first, second, out=first)
        else:
            torch.maximum(first, second, out=second)
    return [values[rank] for rank in ranks]


@cache
def _network(num_rows: int, ranks: tuple[int, ...]) -> list[tuple[int, int, bool, bool]]:
    """Return (low, high, whether the minimum is needed, whether the maximum is) in the order of execution."""
    needed = set(ranks)
    kept = []
    for low, high in reversed(list(_merge_exchange(num_rows))):
        if low in needed or high in needed:
            kept.append((low, high, low in needed, high in needed))
            needed |= {low, high}
    return kept[::-1]


def _merge_exchange(num_rows: int) -> Iterator[tuple[int, int]]:
    if num_rows < 2:
        return
    largest = 1 << ((num_rows - 1).bit_length() - 1)
    p = largest
    while p > 0:
        q, r, distance = largest, 0, p
        while distance > 0:
            yield from ((i, i + distance) for i in range(num_rows - distance) if i & p == r)
            distance, q, r = q - p, q // 2, p
        p //= 2
