"""The exchange in which every rank aggregates its share of the columns."""

from collections.abc import Sequence
from itertools import chain
from typing import Self

import torch.distributed as dist
from torch import Tensor, nn

from lightning_byzantine.exchange.collectives import start_gather, start_gather_of_parts
from lightning_byzantine.exchange.exchange import Exchange, KeptMemory, Wait, num_columns
from lightning_byzantine.exchange.shards import Shards
from lightning_byzantine.exchange.witnesses import Witnesses
from lightning_byzantine.matrix import Names, Segments, WorkerMatrix
from lightning_byzantine.matrix.arriving import Arriving

__all__ = ["AllToAll"]


class AllToAll(Exchange):
    """Every rank receives its share of the columns from all workers, aggregates it, and sends the result to all.

    With one worker per rank, a rank receives about 2 d elements, as in a ring all-reduce, and holds about as many: its
    vector in equal shards, and its columns of all vectors. Each statistic of whole rows is completed by a small float64
    all-reduce, so that all ranks make the same decisions as under
    :class:`~lightning_byzantine.exchange.all_gather.AllGather`. Every rank is trusted to aggregate its own columns, to
    undo their momentum, and to report their statistics, correctly.

    Args:
        num_ranks: number of processes, m / k.
        witnesses: compare what ranks tell each other about :meth:`on_any_rank`; None for ranks that trust each other in
            this.
        shards: where a rank holds a part of its worker's vector only, of which it aggregates its share of the columns.

    """

    divides_columns = True

    def __init__(self, num_ranks: int, witnesses: Witnesses | None = None, shards: Shards | None = None) -> None:
        super().__init__(witnesses, shards)
        self._num_ranks = num_ranks
        self._lengths: list[int] = []
        self._unsharded = KeptMemory()

    def allocate(self, num_rows: int, num_columns: int, like: Tensor) -> Tensor:
        """Return kept memory; with one worker per rank, that of the shards, so that they need no copy."""
        index = len(self._started)
        if num_rows > 1:
            return self._unsharded.get(index, like, num_rows, num_columns)
        shards = self._sent.get(index, like, self._num_ranks, self._width(num_columns))
        return shards.view(-1)[:num_columns][None]

    def let_go(self) -> bool:
        """Do so with one worker per rank; what several send is kept apart from its shards."""
        return len(self._unsharded) == 0 and super().let_go()

    def send(self, index: int, rows: Tensor) -> tuple[Tensor, list[Wait]]:
        """Send every rank its columns of one block asynchronously, while backward continues."""
        num_local, length = rows.shape
        self._lengths[index:] = [length]
        width = self._width(length)
        sent = self._sent.get(index, rows, self._num_ranks * num_local, width)
        for rank, shard in enumerate(sent.view(self._num_ranks, num_local, width)):
            own = rows[:, rank * width : (rank + 1) * width]
            if rows.data_ptr() != sent.data_ptr():
                shard[:, : own.shape[1]] = own
            shard[:, own.shape[1] :] = 0  # padding, which changes neither norms nor distances
        shards = self._received.get(index, rows, self._num_ranks * num_local, width)
        return shards, [dist.all_to_all_single(shards.view(-1), sent.view(-1), group=self._group, async_op=True).wait]

    def matrix(self, blocks: Arriving, layout: tuple[Names, ...] | None, segments: Segments | None) -> WorkerMatrix:
        """Return the matrix of the shards."""
        self._unsharded.truncate(len(blocks))
        if segments is not None:
            segments = segments.shard(self.rank, [block.shape[1] for block in blocks.memory])
        if self._shards is None:
            return WorkerMatrix(blocks, _sum_over_ranks, self.rank, layout, segments)
        # The columns are divided among all ranks of all workers.
        return WorkerMatrix(blocks, _sum_over_ranks, dist.get_rank(), layout, segments, num_columns(segments))

    def without_memory(self) -> Self:
        """Return another exchange between the same ranks, which does not keep this one's memory from being freed."""
        other = super().without_memory()
        other._unsharded = KeptMemory()
        return other

    def columns_of(self, length: int) -> slice:
        """Return which columns are in this rank's shard."""
        start, stop = (min(rank * self._width(length), length) for rank in (self.rank, self.rank + 1))
        return slice(start, stop)

    def padded(self, own: Tensor, length: int) -> Tensor:
        """Return this rank's shard of a block of this length, padded like those that were sent."""
        return nn.functional.pad(own, (0, self._width(length) - own.numel()))

    def complete(self, wholes: Sequence[Tensor]) -> None:
        """Fill in the other ranks' shards of whole blocks."""
        widths = [self._width(whole.numel()) for whole in wholes]
        started = [
            start_gather_of_parts(whole, width, self._group) for whole, width in zip(wholes, widths, strict=True)
        ]
        for wait in chain.from_iterable(started):
            wait()

    def collect(self, parts: list[Tensor]) -> list[Tensor]:
        """Gather the aggregated shards of each block."""
        super().collect(parts)
        # Reuse the memory of the received columns, which are not needed any more.
        wholes = [self._received.first(index, self._num_ranks * part.numel()) for index, part in enumerate(parts)]
        waits = [
            # The rule may have returned a received row itself.
            start_gather(whole, part.clone() if _overlap(whole, part) else part, self._group)
            for whole, part in zip(wholes, parts, strict=True)
        ]
        for wait in chain.from_iterable(waits):
            wait()
        return [whole[:length] for whole, length in zip(wholes, self._lengths, strict=True)]

    def _width(self, length: int) -> int:
        return max(1, -(-length // self._num_ranks))  # equal shards for all, none of them empty


def _sum_over_ranks(statistic: Tensor) -> Tensor:
    dist.all_reduce(statistic)
    return statistic


def _overlap(first: Tensor, second: Tensor) -> bool:
    return first.untyped_storage().data_ptr() == second.untyped_storage().data_ptr()
