"""Order statistics of every column, computed by a network of minima and maxima."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cache, reduce

import torch
from torch import Tensor

from lightning_byzantine.matrix.column_function import ColumnFunction

__all__ = ["MeanOfRanks", "mean_of_rows", "order_statistics"]


@dataclass(frozen=True)
class MeanOfRanks(ColumnFunction):
    """The mean, in every column, of the values at certain ranks of the sorted column.

    Args:
        ranks: in [0, m); 0 is the smallest value.

    Example:
        >>> MeanOfRanks((1, 2))(torch.tensor([[3.0], [1.0], [2.0], [90.0]]))
        tensor([2.5000], dtype=torch.float64)

    """

    ranks: tuple[int, ...]

    def __call__(self, rows: Tensor) -> Tensor:
        """Map m rows [m, c], which are overwritten, to [c]: float64, or a value as it is."""
        return mean_of_rows(order_statistics(rows, self.ranks))

    def unrolled(self, rows: Sequence[Tensor]) -> Tensor:
        """Return the same without writing in place: for a compiler, which keeps all values in registers."""
        values = list(rows)
        for low, high, keeps_low, keeps_high in _network(len(values), self.ranks):
            first, second = values[low], values[high]
            if keeps_low:
                values[low] = torch.minimum(first, second)
            if keeps_high:
                values[high] = torch.maximum(first, second)
        kept = [values[rank] for rank in self.ranks]
        return reduce(torch.add, [row.double() for row in kept]) / len(kept) if len(kept) > 1 else kept[0]


def mean_of_rows(rows: Sequence[Tensor]) -> Tensor:
    """Return the mean of rows [c] in float64, so that its rounding breaks no tie of distances from it; of one, itself.

    Example:
        >>> mean_of_rows([torch.tensor([0.5]), torch.tensor([1.0])])
        tensor([0.7500], dtype=torch.float64)

    """
    # Row by row, so that the result of a coordinate does not depend on the chunk it is in; in place, because allocating
    # new pages takes as long.
    first, *others = rows
    if not others:
        return first
    total = first.to(torch.float64, copy=True)
    for row in others:
        total += row
    return total.div_(len(rows))


def order_statistics(rows: Tensor, ranks: Sequence[int]) -> list[Tensor]:
    """Return the values at ``ranks`` of every sorted column.

    A sorting network on whole rows, without comparisons that ``ranks`` don't depend on. Its operations are vectorized
    and do not depend on the values, while sorting columns goes from one value to the next.

    Args:
        rows: [m, c] without NaN; overwritten, so that these rows stay in the cache.
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
    """Return (low, high, whether the minimum is needed, whether the maximum is needed) in order of execution."""
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
