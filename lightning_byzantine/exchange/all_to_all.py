"""The exchange in which every rank aggregates its share of the columns."""

import torch.distributed as dist
from torch import Tensor, nn

from lightning_byzantine.exchange.collectives import arriving, start_gather, wait
from lightning_byzantine.exchange.kept_memory import KeptMemory
from lightning_byzantine.matrix import Names, WorkerMatrix
from lightning_byzantine.matrix.arriving import Arriving

__all__ = ["AllToAll"]


class AllToAll:
    """Every rank receives its share of the columns from all workers, aggregates it, and sends the result to all.

    With one worker per rank, a rank receives about 2 d elements, as in a ring all-reduce, and holds about as many: its
    vector in equal shards, and its columns of all vectors, which the result overwrites. Each statistic of whole rows is
    completed by a small float64 all-reduce, so that all ranks make the same decisions as under
    :class:`~lightning_byzantine.exchange.all_gather.AllGather`. Every rank is trusted to aggregate its own columns, and
    to report their statistics, correctly.

    Args:
        num_ranks: number of processes, m / k.

    """

    def __init__(self, num_ranks: int) -> None:
        self._num_ranks = num_ranks
        self._started: list[tuple[Tensor, int, Names, list[dist.Work]]] = []
        self._arriving = Arriving([])
        self._lengths: list[int] = []
        self._sent, self._received, self._unsharded = KeptMemory(), KeptMemory(), KeptMemory()

    @property
    def rank(self) -> int:
        """Rank of this process."""
        return dist.get_rank()

    def allocate(self, num_rows: int, num_columns: int, like: Tensor) -> Tensor:
        """Return kept memory; with one worker per rank, that of the shards, so that they need no copy."""
        index = len(self._started)
        if num_rows > 1:
            return self._unsharded.get(index, like, num_rows, num_columns)
        shards = self._sent.get(index, like, self._num_ranks, self._width(num_columns))
        return shards.view(-1)[:num_columns][None]

    def start(self, rows: Tensor, names: Names = ()) -> None:
        """Send every rank its columns of one block asynchronously, while backward continues."""
        num_local, length = rows.shape
        index, width = len(self._started), self._width(length)
        sent = self._sent.get(index, rows, self._num_ranks * num_local, width)
        for rank, shard in enumerate(sent.view(self._num_ranks, num_local, width)):
            own = rows[:, rank * width : (rank + 1) * width]
            if rows.data_ptr() != sent.data_ptr():
                shard[:, : own.shape[1]] = own
            shard[:, own.shape[1] :] = 0  # padding, which changes neither norms nor distances
        shards = self._received.get(index, rows, self._num_ranks * num_local, width)
        work = dist.all_to_all_single(shards.view(-1), sent.view(-1), async_op=True)
        self._started.append((shards, length, names, [work]))

    def finish(self) -> WorkerMatrix:
        """Return the shards."""
        started, self._started = self._started, []
        self._arriving = arriving([shards for shards, *_ in started], [works for *_, works in started])
        for memory in (self._sent, self._received, self._unsharded):
            memory.keep(len(started))
        self._lengths = [length for _, length, *_ in started]
        return WorkerMatrix(self._arriving, _sum_over_ranks, self.rank, tuple(names for _, _, names, _ in started))

    def own_columns(self, wholes: list[Tensor]) -> list[Tensor]:
        """Return this rank's shard of each block, padded like those that were sent."""
        shards = []
        for whole in wholes:
            width = self._width(whole.numel())
            own = whole[self.rank * width :][:width]
            shards.append(nn.functional.pad(own, (0, width - own.numel())))
        return shards

    def collect(self, parts: list[Tensor]) -> list[Tensor]:
        """Gather the aggregated shards of each block."""
        list(self._arriving)
        # Reuse the memory of the received columns, which are not needed any more.
        wholes = [self._received.first(index, self._num_ranks * part.numel()) for index, part in enumerate(parts)]
        for works in [
            # The rule may have returned a received row itself.
            start_gather(whole, part.clone() if _overlap(whole, part) else part)
            for whole, part in zip(wholes, parts, strict=True)
        ]:
            wait(works)
        return [whole[:length] for whole, length in zip(wholes, self._lengths, strict=True)]

    def _width(self, length: int) -> int:
        return -(-length // self._num_ranks)  # equal shards for all


def _sum_over_ranks(statistic: Tensor) -> Tensor:
    dist.all_reduce(statistic)
    return statistic


def _overlap(first: Tensor, second: Tensor) -> bool:
    return first.untyped_storage().data_ptr() == second.untyped_storage().data_ptr()
