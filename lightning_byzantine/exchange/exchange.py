"""Collectives: from the vectors of a process's own workers to the matrix of all workers."""

from typing import Protocol

import torch
import torch.distributed as dist
from torch import Tensor, nn

from lightning_byzantine.matrix import Names, WorkerMatrix
from lightning_byzantine.matrix.arriving import Arriving

__all__ = ["AllGather", "AllToAll", "Exchange", "gather", "gather_rows", "gather_to_first"]


class Exchange(Protocol):
    """One exchange a step: :meth:`start` for every block of the workers' vectors, :meth:`finish`, :meth:`collect`.

    Memory is kept from step to step, so whatever an exchange returns is valid until the next :meth:`start`.
    """

    def room(self, num_rows: int, num_columns: int, like: Tensor) -> Tensor:
        """Return memory [k, c] for the next block to start, so that it need not be copied; its contents are left over.

        Args:
            num_rows: k.
            num_columns: c.
            like: any tensor of the block's dtype and device.

        """

    def start(self, rows: Tensor, names: Names = ()) -> None:
        """Begin to send one block.

        Args:
            rows: [k, c], of the k workers that this process acts as, the same number on all ranks. Must not be written
                to before :meth:`collect` has returned.
            names: the parameters that make up the columns.

        """

    def finish(self, previous: list[Tensor] | None = None) -> WorkerMatrix:
        """Return all blocks as a matrix, in the order they were started, which may still be on their way.

        Rows go by rank, and within a rank as they were sent. They may be overwritten by :meth:`collect`.

        Args:
            previous: what came of the step before, as whole blocks [c]; the matrix has this rank's part of it.

        """

    def collect(self, parts: list[Tensor]) -> list[Tensor]:
        """Turn what this rank made of the matrix's blocks into whole blocks [c], the same on every rank."""


class AllGather:
    """Every rank receives every worker's vector and aggregates for itself: it trusts nobody's values.

    A rank moves (m - k) d elements and holds (m + k + 1) d: all vectors, its own, and the result. A single one needs no
    process group.

    Args:
        num_ranks: number of processes, m / k.

    Example:
        >>> exchange = AllGather(num_ranks=1)
        >>> exchange.start(torch.tensor([[1.0, 2.0]]))
        >>> exchange.finish().num_workers
        1

    """

    def __init__(self, num_ranks: int) -> None:
        self.num_ranks = num_ranks
        self._started: list[tuple[Tensor, Names, list[dist.Work]]] = []
        self._arriving = Arriving([])
        self._sent, self._received = _Buffers(), _Buffers()

    def room(self, num_rows: int, num_columns: int, like: Tensor) -> Tensor:
        """Return kept memory."""
        return self._sent.get(len(self._started), like, num_rows, num_columns)

    def start(self, rows: Tensor, names: Names = ()) -> None:
        """Gather one block asynchronously, so that backward goes on meanwhile."""
        if self.num_ranks == 1:
            self._started.append((rows, names, []))
            return
        received = self._received.get(len(self._started), rows, self.num_ranks * rows.shape[0], rows.shape[1])
        self._started.append((received, names, _start_gather(received.view(-1), rows.view(-1))))

    def finish(self, previous: list[Tensor] | None = None) -> WorkerMatrix:
        """Return the vectors."""
        started, self._started = self._started, []
        self._arriving = _arriving([rows for rows, *_ in started], [works for *_, works in started])
        for buffers in (self._sent, self._received):
            buffers.keep(len(started))
        matrix = WorkerMatrix(self._arriving, layout=tuple(names for _, names, _ in started))
        matrix.previous = previous
        return matrix

    def collect(self, parts: list[Tensor]) -> list[Tensor]:
        """Return the parts: every rank has aggregated all columns."""
        list(self._arriving)  # or others would wait in vain, should a rule have left a block unread
        return parts


class AllToAll:
    """Every rank receives all workers' values of its share of the columns, aggregates those, and shares the result.

    With one worker a rank, it moves about 2 d elements, as in a ring all-reduce, and holds about as many: its vector in
    equal shards, and its columns of all vectors, in whose place the result comes. Statistics of whole rows are
    completed by a small float64 all-reduce each, so that all ranks decide alike, and as :class:`AllGather` would have
    them decide. It trusts that every rank aggregates its own columns, and reports their statistics, correctly.

    Args:
        num_ranks: number of processes, m / k.

    Example:
        >>> exchange = AllToAll(num_ranks=1)
        >>> exchange.start(torch.tensor([[1.0, 2.0]]))
        >>> exchange.collect([exchange.finish().blocks[0][0]])
        [tensor([1., 2.])]

    """

    def __init__(self, num_ranks: int) -> None:
        self.num_ranks = num_ranks
        self._started: list[tuple[Tensor, int, Names, list[dist.Work]]] = []
        self._arriving = Arriving([])
        self._lengths: list[int] = []
        self._sent, self._received, self._unsharded = _Buffers(), _Buffers(), _Buffers()

    def room(self, num_rows: int, num_columns: int, like: Tensor) -> Tensor:
        """Return kept memory; that of the shards themselves where a rank is one worker."""
        index = len(self._started)
        if num_rows > 1 or self.num_ranks == 1:
            return self._unsharded.get(index, like, num_rows, num_columns)
        shards = self._sent.get(index, like, self.num_ranks, self._width(num_columns))
        return shards.view(-1)[:num_columns][None]

    def start(self, rows: Tensor, names: Names = ()) -> None:
        """Send every rank its columns of one block asynchronously, so that backward goes on meanwhile."""
        num_local, length = rows.shape
        if self.num_ranks == 1:
            self._started.append((rows, length, names, []))
            return
        index, width = len(self._started), self._width(length)
        sent = self._sent.get(index, rows, self.num_ranks * num_local, width)
        for rank, shard in enumerate(sent.view(self.num_ranks, num_local, width)):
            own = rows[:, rank * width : (rank + 1) * width]
            if rows.data_ptr() != sent.data_ptr():
                shard[:, : own.shape[1]] = own
            shard[:, own.shape[1] :] = 0  # changes no norm and no distance
        shards = self._received.get(index, rows, self.num_ranks * num_local, width)
        work = dist.all_to_all_single(shards.view(-1), sent.view(-1), async_op=True)
        self._started.append((shards, length, names, [work]))

    def finish(self, previous: list[Tensor] | None = None) -> WorkerMatrix:
        """Return the shards."""
        started, self._started = self._started, []
        self._arriving = _arriving([shards for shards, *_ in started], [works for *_, works in started])
        for buffers in (self._sent, self._received, self._unsharded):
            buffers.keep(len(started))
        self._lengths = [length for _, length, *_ in started]
        layout = tuple(names for _, _, names, _ in started)
        matrix = WorkerMatrix(self._arriving, self._sum_over_ranks, self._rank(), layout)
        matrix.previous = None if previous is None else [self._own_columns(whole) for whole in previous]
        return matrix

    def collect(self, parts: list[Tensor]) -> list[Tensor]:
        """Gather the aggregated shards of each block."""
        if self.num_ranks == 1:
            return parts
        list(self._arriving)
        # Nobody needs the columns any more that they were made of.
        wholes = [self._received.first(index, self.num_ranks * part.numel()) for index, part in enumerate(parts)]
        for works in [
            # A rule may have returned a row as it came.
            _start_gather(whole, part.clone() if _overlap(whole, part) else part)
            for whole, part in zip(wholes, parts, strict=True)
        ]:
            _wait(works)
        return [whole[:length] for whole, length in zip(wholes, self._lengths, strict=True)]

    def _own_columns(self, whole: Tensor) -> Tensor:
        width = self._width(whole.numel())
        own = whole[self._rank() * width :][:width]
        return nn.functional.pad(own, (0, width - own.numel()))

    def _width(self, length: int) -> int:
        return -(-length // self.num_ranks)  # equal shards for all

    def _rank(self) -> int:
        return dist.get_rank() if self.num_ranks > 1 else 0

    def _sum_over_ranks(self, statistic: Tensor) -> Tensor:
        if self.num_ranks > 1:
            dist.all_reduce(statistic)
        return statistic


class _Buffers:
    """Memory that is kept from step to step: one [rows, columns] tensor for each block."""

    def __init__(self) -> None:
        self._buffers: dict[int, Tensor] = {}

    def get(self, index: int, like: Tensor, rows: int, columns: int) -> Tensor:
        """Return the tensor of that block, with the contents it had, made anew if its shape or dtype has changed."""
        buffer = self._buffers.get(index)
        if buffer is None or buffer.shape != (rows, columns) or buffer.dtype != like.dtype:
            buffer = like.new_empty(rows, columns)
            self._buffers[index] = buffer
        return buffer

    def keep(self, count: int) -> None:
        """Forget all blocks but the first: DDP may have made fewer buckets of the same parameters."""
        self._buffers = {index: buffer for index, buffer in self._buffers.items() if index < count}

    def first(self, index: int, length: int) -> Tensor:
        """Return the first elements of that block, flat."""
        return self._buffers[index].view(-1)[:length]


def _start_gather(received: Tensor, own: Tensor) -> list[dist.Work]:
    """Begin to gather every rank's flat tensor, one after the other in ``received``."""
    if dist.get_backend() != "gloo" or own.device.type != "cpu":
        return [_all_gather(received, own, async_op=True)]
    # gloo's own goes through twice the memory, at a third of the speed. Its sends read the host's memory only.
    rank, parts = dist.get_rank(), received.chunk(dist.get_world_size())
    works: list[dist.Work | None] = []
    for distance in range(1, len(parts)):
        sender, receiver = (rank - distance) % len(parts), (rank + distance) % len(parts)
        works += [dist.irecv(parts[sender], sender), dist.isend(own, receiver)]
    parts[rank].copy_(own)
    return [work for work in works if work is not None]


def _wait(works: list[dist.Work]) -> None:
    for work in works:
        work.wait()


def _arriving(memory: list[Tensor], works: list[list[dist.Work]]) -> Arriving:
    return Arriving(memory, [[work.wait for work in of_block] for of_block in works])


def _overlap(first: Tensor, second: Tensor) -> bool:
    return first.untyped_storage().data_ptr() == second.untyped_storage().data_ptr()


def gather(tensor: Tensor) -> list[Tensor]:
    """Return every rank's flat tensor on every rank, moved to the CPU; lengths must agree."""
    return list(gather_rows(tensor).cpu())


def gather_rows(tensor: Tensor) -> Tensor:
    """Return every rank's flat tensor [n] on every rank, as [m, n] where it was; lengths must agree."""
    rows = tensor.new_empty(dist.get_world_size(), tensor.numel())
    _all_gather(rows.view(-1), tensor)
    return rows


def gather_to_first(tensor: Tensor) -> list[Tensor] | None:
    """Return every rank's tensor on rank 0, moved to the CPU, and None elsewhere; shapes must agree.

    Tensors only: to unpickle objects that other ranks sent would let them run code here.
    """
    tensor = tensor.contiguous()
    if dist.get_rank() != 0:
        dist.gather(tensor, dst=0)
        return None
    received = [torch.empty_like(tensor) for _ in range(dist.get_world_size())]
    dist.gather(tensor, received, dst=0)
    return [part.cpu() for part in received]


# torch 2.13 renamed all_gather_into_tensor and warns of the old name. Older ones, which have that name alone, are not
# supported as installations, but GPU images lag, and a source tree should run there.
_all_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
