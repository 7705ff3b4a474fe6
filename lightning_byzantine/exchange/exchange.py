"""The base class of exchanges, which turn the vectors of each process into the matrix of all workers."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from copy import copy
from functools import partial
from typing import Protocol, Self, TypeVar

import torch.distributed as dist
from torch import Tensor

from lightning_byzantine.exchange.agreed_gather import agreed_gather
from lightning_byzantine.exchange.shards import Shards
from lightning_byzantine.exchange.witnesses import Witnesses
from lightning_byzantine.matrix import Names, Segments, WorkerMatrix
from lightning_byzantine.matrix.arriving import Arriving

__all__ = ["Exchange", "KeptMemory", "Outcome", "Wait", "num_columns"]

# Returns when what was started has been done.
Wait = Callable[[], object]


class Outcome(Protocol):
    """What follows from the rows of one step."""

    def digest(self, key: bytes | None) -> bytes:
        """Return a digest of all of it, 32 bytes: a fast one with a key, or a slower one without."""


AnyOutcome = TypeVar("AnyOutcome", bound=Outcome)


class KeptMemory:
    """One [rows, columns] tensor for each block, reallocated only if its shape or dtype changes."""

    def __init__(self) -> None:
        self._buffers: dict[int, Tensor] = {}

    def __len__(self) -> int:
        """Return the number of blocks."""
        return len(self._buffers)

    def get(self, index: int, like: Tensor, rows: int, columns: int) -> Tensor:
        """Return the tensor of a block with its old contents, or a new one if its shape or dtype has changed."""
        buffer = self._buffers.get(index)
        if buffer is None or buffer.shape != (rows, columns) or buffer.dtype != like.dtype:
            buffer = like.new_empty(rows, columns)
            self._buffers[index] = buffer
        return buffer

    def truncate(self, count: int) -> None:
        """Free all but the first blocks: DDP may have rebuilt its buckets, so that there are fewer."""
        self._buffers = {index: buffer for index, buffer in self._buffers.items() if index < count}

    def first(self, index: int, length: int) -> Tensor:
        """Return the first elements of a block, flat."""
        return self._buffers[index].view(-1)[:length]


class Exchange(ABC):
    """Sends blocks of vectors between ranks: call :meth:`start` for every block, :meth:`finish`, then :meth:`collect`.

    Memory is reused: the next step overwrites the matrix, what :meth:`collect` returned, and what :meth:`allocate`
    returned unless that was let go.

    Attributes:
        divides_columns: whether each rank's matrix has its share of the columns only.

    Args:
        witnesses: compare what ranks tell each other; None for ranks that trust each other in this.
        shards: where this rank holds a part of its worker's vector only; None if it holds all of it. The exchange is
            then one between the ranks with the same part, and ``num_ranks`` their number.

    """

    divides_columns = False

    def __init__(self, witnesses: Witnesses | None = None, shards: Shards | None = None) -> None:
        self._witnesses = witnesses
        self._shards = shards
        self._started: list[tuple[Tensor, list[Wait]]] = []
        self._arriving = Arriving([])
        self._sent, self._received = KeptMemory(), KeptMemory()
        # Memory that the caller keeps: two steps take turns, so that no step overwrites what the one before has sent.
        self._let_go = KeptMemory()

    @property
    def rank(self) -> int:
        """Rank r of this process in the exchange, which acts as the k workers from r k on."""
        return dist.get_rank(self._group)

    @property
    def _group(self) -> dist.ProcessGroup | None:
        return None if self._shards is None else self._shards.across

    def sum_of_parts(self, statistic: Tensor) -> Tensor:
        """Return the sum of a float64 statistic of this process's vectors over the ranks that hold parts of them."""
        return statistic if self._shards is None else self._shards.sum(statistic)

    def norm_of_parts(self, norm: Tensor) -> Tensor:
        """Return the norm of a vector, given that of the part of it that this rank holds."""
        return norm if self._shards is None else self._shards.sum(norm.double().square()).sqrt().to(norm.dtype)

    @abstractmethod
    def send(self, index: int, rows: Tensor) -> tuple[Tensor, list[Wait]]:
        """Start sending the rows [k, c] of block number ``index``.

        Returns:
            Memory [m, c'] for the rows of all workers, and what to call before it may be read.

        """

    def allocate(self, num_rows: int, num_columns: int, like: Tensor) -> Tensor:
        """Return uninitialized memory [k, c] for the next block, so that :meth:`start` need not copy it.

        Args:
            num_rows: k.
            num_columns: c.
            like: any tensor of the block's dtype and device.

        """
        return self._sent.get(len(self._started), like, num_rows, num_columns)

    def let_go(self) -> bool:
        """Leave what :meth:`allocate` returned in this step to the caller, until the next call.

        The next step uses what was left to the caller before, or other memory.

        Returns:
            Whether that was done: not if collectives of this step or the next one write to it.

        """
        self._sent, self._let_go = self._let_go, self._sent
        return True

    def start(self, rows: Tensor) -> None:
        """Start sending one block.

        Args:
            rows: [k, c], of the k workers that this process acts as, the same number on all ranks. Must not be written
                to before :meth:`collect` has returned.

        """
        self._started.append(self.send(len(self._started), rows))

    def finish(
        self,
        layout: tuple[Names, ...] | None = None,
        cleared: Sequence[Tensor] | None = None,
        segments: Segments | None = None,
    ) -> WorkerMatrix:
        """Return all blocks as a matrix, in the order they were started; they may still be arriving.

        Rows are ordered by rank, and within a rank as they were sent. :meth:`collect` may overwrite them.

        Args:
            layout: the parameters that make up the columns of each block.
            cleared: for each block, this rank's columns that shall be 0 in all rows, [c'] bool; None for none.
            segments: which columns of the whole blocks belong to which parameter; None for a single segment.

        """
        started, self._started = self._started, []
        for kept in (self._sent, self._let_go, self._received):
            kept.truncate(len(started))
        for (received, waits), columns in zip(started, cleared or (), strict=cleared is not None):
            # A single row is compared with no other, and may be the sender's own memory.
            if len(received) > 1:
                waits.append(partial(received.masked_fill_, columns, 0))
        self._arriving = Arriving(*zip(*started, strict=True))
        return self.matrix(self._arriving, layout, segments)

    def on_any_rank(self, flags: Tensor) -> Tensor:
        """Return which flags are set on any rank of any worker, [n] bool on the CPU: no rank can clear another's.

        Args:
            flags: [n] bool.

        """
        return agreed_gather(flags.byte(), self._witnesses).any(dim=0).cpu()

    def matrix(self, blocks: Arriving, layout: tuple[Names, ...] | None, segments: Segments | None) -> WorkerMatrix:
        """Return the matrix of the blocks."""
        if self._shards is None:
            return WorkerMatrix(blocks, layout=layout, segments=segments)
        return WorkerMatrix(blocks, self._shards.sum, self._shards.index, layout, segments, num_columns(segments))

    def agreed(
        self,
        matrix: WorkerMatrix,
        attempt: Callable[[WorkerMatrix], AnyOutcome],
        save: Callable[[], Callable[[], object]],
    ) -> AnyOutcome:
        """Return what follows from the matrix; from another one if ranks were sent different rows.

        Args:
            matrix: what :meth:`finish` returned.
            attempt: computes what follows from a matrix.
            save: called before the first attempt; what it returns is called before each other one.

        """
        return attempt(matrix)

    def without_memory(self) -> Self:
        """Return another exchange between the same ranks, which does not keep this one's memory from being freed."""
        other = copy(self)
        other._sent, other._received, other._arriving = KeptMemory(), KeptMemory(), Arriving([])
        other._let_go, other._started = KeptMemory(), []
        return other

    def columns_of(self, length: int) -> slice:
        """Return which columns of a block of this length this rank's matrix has, besides padding: all of them."""
        return slice(0, length)

    def padded(self, own: Tensor, length: int) -> Tensor:
        """Return this rank's columns, of a block of this length, with the matrix's padding by 0: here none."""
        return own

    def own_columns(self, wholes: list[Tensor]) -> list[Tensor]:
        """Return this rank's columns of whole blocks [c], padded."""
        lengths = [whole.numel() for whole in wholes]
        return [
            self.padded(whole[self.columns_of(length)], length) for whole, length in zip(wholes, lengths, strict=True)
        ]

    def wait(self) -> None:
        """Wait for blocks that the rule did not read, which would block other ranks."""
        list(self._arriving)

    def complete(self, wholes: Sequence[Tensor]) -> None:  # noqa: B027  (there may be none)
        """Fill in the columns of whole blocks [c] that other ranks have."""

    def collect(self, parts: list[Tensor]) -> list[Tensor]:
        """Return whole blocks [c], the same on every rank, given the aggregate of this rank's columns."""
        self.wait()
        return parts


def num_columns(segments: Segments | None) -> int | None:
    """Return the number of columns on all ranks together; None if it is not known."""
    return None if segments is None else sum(segments.sizes)
