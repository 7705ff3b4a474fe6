"""Column blocks of all workers' vectors, cut into chunks that fit the cache."""

from collections.abc import Callable, Iterator, Sequence
from functools import cached_property

import torch
from torch import Tensor

from lightning_byzantine.matrix.arriving import Arriving
from lightning_byzantine.matrix.segments import Group, Segments

__all__ = ["FEW", "Blocks", "at_least_float32", "float64", "in_chunks"]

# Bytes of one chunk. On a CPU, small enough to stay in the cache, and large enough to be divided among cores; on an
# accelerator, large enough that the cost of launching kernels is negligible.
_CPU_CHUNK = 2**22
_ACCELERATOR_CHUNK = 2**27
# Parameters of fewer elements, such as biases, don't show by themselves who deviates.
_LEAST = 100
# Up to so many columns take no time in float64, and float32 arithmetic is not sharp enough: its errors average out over
# many.
FEW = 2**16


def at_least_float32(dtype: torch.dtype) -> torch.dtype:
    """Return the dtype to compute in: half precision is too coarse for sums."""
    return torch.promote_types(dtype, torch.float32)


def float64(_: torch.dtype) -> torch.dtype:
    """Return float64 for any dtype of the block: for statistics."""
    return torch.float64


class Blocks:
    """The stored rows, as column blocks [m, c_b] of any floating-point dtypes, which are never written to.

    Args:
        blocks: on one device. Passes over the columns wait for each block when they reach it.
        complete: sums a float64 statistic over all ranks, if these hold different columns of the same rows.
        segments: which columns belong to which parameter; None for a single segment.
        are_quick: whether float32 arithmetic is faster than float64's and as good; None to look at the blocks: they are
            if they are float32. Collectives depend on it, so it has to be the same on every rank, even if some have
            none of these columns.
        most_columns: upper bound of the number of columns on all ranks together, the same on every rank; None for one
            that holds if each has the same number, or all.

    Example:
        >>> blocks = Blocks([torch.ones(2, 3), torch.ones(2, 1)], complete=lambda total: total)
        >>> [tuple(chunk.shape) for index in range(2) for _, chunk in blocks.chunks(index, torch.tensor([1]), float64)]
        [(1, 3), (1, 1)]

    """

    def __init__(
        self,
        blocks: Sequence[Tensor] | Arriving,
        complete: Callable[[Tensor], Tensor],
        segments: Segments | None = None,
        are_quick: bool | None = None,
        most_columns: int | None = None,
    ) -> None:
        self.arriving = blocks if isinstance(blocks, Arriving) else Arriving(blocks)
        self.complete = complete
        self.segments = segments
        self._agreed = are_quick, most_columns
        if are_quick is None:
            are_quick = all(part.dtype == torch.float32 for part in self.memory)
        if most_columns is None:  # there are no more ranks than rows
            most_columns = self.num_rows * sum(part.shape[1] for part in self.memory)
        self.are_quick, self.most_columns = are_quick, most_columns

    @cached_property
    def groups(self) -> tuple[Group, ...]:
        """The segments that are large enough to be looked at on their own: small ones belong to their neighbours'.

        Empty where there are no segments, or no parameter takes part in this step.
        """
        return () if self.segments is None else self.segments.grouped(_LEAST)

    def runs(self, index: int, columns: slice) -> list[tuple[slice, int]]:
        """Return which columns of a chunk of a block are neighbours among all parameters, and the first's place there.

        Without segments, the columns of all blocks are what there is.
        """
        if self.segments is None:
            before = sum(part.shape[1] for part in self.memory[:index])
            stop = min(columns.stop, self.memory[index].shape[1])
            return [(slice(0, stop - columns.start), before + columns.start)]
        cut = [
            (max(run.start, columns.start), min(run.stop, columns.stop), place - run.start)
            for run, place in self._runs[index]
        ]
        return [
            (slice(low - columns.start, high - columns.start), place + low) for low, high, place in cut if low < high
        ]

    @cached_property
    def _runs(self) -> list[list[tuple[slice, int]]]:
        return [] if self.segments is None else [self.segments.runs(index) for index in range(len(self.memory))]

    def like(self, blocks: Sequence[Tensor] | None = None, segments: Segments | None = None) -> "Blocks":
        """Return the same columns with other values or other segments."""
        values = self.arriving if blocks is None else blocks
        return Blocks(values, self.complete, segments or self.segments, *self._agreed)

    def split(self) -> list["Blocks"]:
        """Return the columns of each of :attr:`groups`, after waiting for all blocks."""
        whole = list(self.arriving)
        return [
            Blocks(group.of(whole), self.complete, None, self.are_quick_in(group), group.size) for group in self.groups
        ]

    def are_quick_in(self, group: Group) -> bool:
        """Return whether float32 arithmetic is faster and as good in the columns of one of :attr:`groups`."""
        return self.are_quick and group.size > FEW

    @property
    def memory(self) -> list[Tensor]:
        """Memory of the blocks, received or not, for reading shapes, dtypes and devices."""
        return self.arriving.memory

    @property
    def num_rows(self) -> int:
        """Number of stored rows."""
        return self.memory[0].shape[0]

    @property
    def device(self) -> torch.device:
        """Device of the blocks."""
        return self.memory[0].device

    def chunks(
        self, index: int, rows: Tensor, dtype: Callable[[torch.dtype], torch.dtype], row_by_row: bool = False
    ) -> Iterator[tuple[slice, Tensor]]:
        """Yield (columns, the given rows of these columns) of one block, in chunks that fit the cache.

        Args:
            index: which block.
            rows: [n], indices of stored rows; others are not read.
            dtype: maps the block's dtype to that of the chunks.
            row_by_row: whether the caller adds up one row after the other, so that only the sum and one product have to
                fit the cache.

        """
        block = self.arriving[index]
        every_row = torch.equal(rows, torch.arange(block.shape[0]))
        is_copied = not every_row or dtype(block.dtype) != block.dtype
        num_cached = 2 if row_by_row and not is_copied else rows.shape[0]
        for columns, chunk in in_chunks(block, num_cached, dtype(block.dtype)):
            yield columns, (chunk if every_row else chunk[rows.to(block.device)]).to(dtype(block.dtype))


def in_chunks(block: Tensor, num_rows: int, dtype: torch.dtype) -> Iterator[tuple[slice, Tensor]]:
    """Yield (columns, these columns), of which ``num_rows`` rows in another dtype fit the cache."""
    size = _CPU_CHUNK if block.device.type == "cpu" else _ACCELERATOR_CHUNK
    width = max(1, size // (num_rows * dtype.itemsize))
    # A block without columns yields one empty chunk, so that its result is empty instead of missing.
    for start in range(0, max(1, block.shape[1]), width):
        columns = slice(start, start + width)
        yield columns, block[:, columns]
