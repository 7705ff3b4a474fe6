"""Collectives: from every worker's own vector to the matrix of all of them."""

from typing import Protocol

import torch
import torch.distributed as dist
from torch import Tensor

from lightning_byzantine.matrix import WorkerMatrix

__all__ = ["AllGather", "AllToAll", "Exchange", "gather", "gather_rows", "gather_to_first"]


class Exchange(Protocol):
    """One exchange a step: :meth:`start` for every block of the worker's vector, then :meth:`finish` once."""

    def start(self, block: Tensor) -> None:
        """Begin to send one block [c], which must not be written to before :meth:`finish` returned."""

    def finish(self) -> WorkerMatrix:
        """Wait for all blocks and return them as a matrix, in the order they were started.

        Its blocks are valid until the next :meth:`start`.
        """

    def collect(self, parts: list[Tensor]) -> list[Tensor]:
        """Turn what this rank made of the matrix's blocks into whole blocks [c], the same on every rank."""


class AllGather:
    """Every rank receives every worker's vector and aggregates for itself: it trusts nobody's values.

    A rank moves (m - 1) d elements and holds (m + 2) d: all vectors, its own, and the result. Memory for received
    vectors is kept from step to step. A single worker needs no process group.

    Args:
        num_workers: number of ranks, m.

    Example:
        >>> exchange = AllGather(num_workers=1)
        >>> exchange.start(torch.tensor([1.0, 2.0]))
        >>> exchange.finish().num_workers
        1

    """

    def __init__(self, num_workers: int) -> None:
        self.num_workers = num_workers
        self._started: list[tuple[Tensor, dist.Work | None]] = []
        self._received = _Buffers()

    def start(self, block: Tensor) -> None:
        """Gather one block asynchronously, so that backward goes on meanwhile."""
        if self.num_workers == 1:
            self._started.append((block[None], None))
            return
        rows = self._received.get(len(self._started), block, self.num_workers, block.numel())
        self._started.append((rows, _all_gather(rows.view(-1), block, async_op=True)))

    def finish(self) -> WorkerMatrix:
        """Wait for all blocks."""
        started, self._started = self._started, []
        for _, work in started:
            if work is not None:
                work.wait()
        return WorkerMatrix([rows for rows, _ in started])

    def collect(self, parts: list[Tensor]) -> list[Tensor]:
        """Return the parts: every rank has aggregated all columns."""
        return parts


class AllToAll:
    """Every rank receives all workers' values of its 1/m of the columns, aggregates those, and shares the result.

    A rank moves about 2 d elements, as in a ring all-reduce, and holds about 4 d: its vector and a copy in equal
    shards, its columns of all vectors, and the result. Statistics of whole rows are completed by a small float64
    all-reduce each, so that all ranks decide alike, and as :class:`AllGather` would have them decide. It trusts that
    every rank aggregates its own columns, and reports their statistics, correctly.

    Args:
        num_workers: number of ranks, m.

    Example:
        >>> exchange = AllToAll(num_workers=1)
        >>> exchange.start(torch.tensor([1.0, 2.0]))
        >>> exchange.collect([exchange.finish().blocks[0][0]])
        [tensor([1., 2.])]

    """

    def __init__(self, num_workers: int) -> None:
        self.num_workers = num_workers
        self._started: list[tuple[Tensor, int, dist.Work | None]] = []
        self._lengths: list[int] = []
        self._sent, self._received = _Buffers(), _Buffers()

    def start(self, block: Tensor) -> None:
        """Send every rank its columns of one block asynchronously, so that backward goes on meanwhile."""
        if self.num_workers == 1:
            self._started.append((block[None], block.numel(), None))
            return
        # Equal shards for all: the zeros that fill up the last one change no norm and no distance.
        width = -(-block.numel() // self.num_workers)
        padded = self._sent.get(len(self._started), block, self.num_workers, width).view(-1)
        padded[: block.numel()] = block
        padded[block.numel() :] = 0
        shards = self._received.get(len(self._started), block, self.num_workers, width)
        work = dist.all_to_all_single(shards.view(-1), padded, async_op=True)
        self._started.append((shards, block.numel(), work))

    def finish(self) -> WorkerMatrix:
        """Wait for all shards."""
        started, self._started = self._started, []
        for *_, work in started:
            if work is not None:
                work.wait()
        self._lengths = [length for _, length, _ in started]
        return WorkerMatrix([shards for shards, *_ in started], complete=self._sum_over_ranks, shard=self._rank())

    def collect(self, parts: list[Tensor]) -> list[Tensor]:
        """Gather the aggregated shards of each block."""
        if self.num_workers == 1:
            return parts
        wholes = [part.new_empty(self.num_workers * part.numel()) for part in parts]
        works = [_all_gather(whole, part, async_op=True) for whole, part in zip(wholes, parts, strict=True)]
        for work in works:
            work.wait()
        return [whole[:length] for whole, length in zip(wholes, self._lengths, strict=True)]

    def _rank(self) -> int:
        return dist.get_rank() if self.num_workers > 1 else 0

    def _sum_over_ranks(self, statistic: Tensor) -> Tensor:
        if self.num_workers > 1:
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
