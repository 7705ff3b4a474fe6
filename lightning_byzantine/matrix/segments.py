"""Which columns of the workers' matrix belong to which parameter."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from torch import Tensor

from lightning_byzantine.utilities.checks import check_integer_at_least

__all__ = ["Names", "Segments"]

# The parameters of a block, in order; None for one that no worker has used in this step.
Names = tuple[str | None, ...]

# For one block: pairs of a segment's index and its columns. A segment may have several pairs.
Columns = tuple[tuple[int, slice], ...]


@dataclass(frozen=True)
class Segments:
    """A partition of the columns: a segment is one parameter, or several that belong together.

    Columns in no segment are 0 in all rows: those of parameters that take no part in a step, and padding.

    Args:
        names: of all segments, in the order of the module's parameters; unlike blocks, it never changes.
        sizes: number of elements of each, on all ranks together.
        columns: for each block, where this rank's columns of each segment are, in the order of the block.

    Example:
        >>> segments = Segments.of_sizes([120, 3, 200])
        >>> segments.columns
        (((0, slice(0, 120, None)), (1, slice(120, 123, None)), (2, slice(123, 323, None))),)
        >>> segments.grouped(least=100).columns
        (((0, slice(0, 123, None)), (1, slice(123, 323, None))),)

    """

    names: tuple[str, ...]
    sizes: tuple[int, ...]
    columns: tuple[Columns, ...]

    @classmethod
    def of_sizes(cls, sizes: Sequence[int]) -> "Segments":
        """Return the segments of one block, from left to right, named by their index."""
        for size in sizes:
            check_integer_at_least("each of sizes", size, 1)
        names = tuple(str(index) for index in range(len(sizes)))
        return cls.of_blocks(dict(zip(names, sizes, strict=True)), [(names, sizes)])

    @classmethod
    def of_blocks(cls, parameters: Mapping[str, int], blocks: Sequence[tuple[Names, Sequence[int]]]) -> "Segments":
        """Return one segment for each parameter.

        Args:
            parameters: number of elements of all parameters of the module by name, in its order.
            blocks: names and sizes of the parameters in each block, in the order of the columns.

        """
        indices = {name: index for index, name in enumerate(parameters)}
        columns = []
        for names, sizes in blocks:
            stops = [sum(sizes[: index + 1]) for index in range(len(sizes))]
            places = zip(names, sizes, stops, strict=True)
            columns.append(tuple((indices[n], slice(stop - size, stop)) for n, size, stop in places if n is not None))
        return cls(tuple(parameters), tuple(parameters.values()), tuple(columns))

    def shard(self, rank: int, widths: Sequence[int]) -> "Segments":
        """Return the columns of one rank, if block b was divided into shards of ``widths[b]`` columns."""
        columns = [
            _cut(block, rank * width, (rank + 1) * width) for block, width in zip(self.columns, widths, strict=True)
        ]
        return replace(self, columns=tuple(columns))

    def grouped(self, least: int) -> "Segments":
        """Merge each segment of fewer than ``least`` elements with the one before; the first with those after it."""
        group_of: list[int] = []
        names: list[str] = []
        sizes: list[int] = []
        for name, size in zip(self.names, self.sizes, strict=True):
            if names and (size < least or sizes[-1] < least):
                sizes[-1] += size
            else:
                names.append(name)
                sizes.append(size)
            group_of.append(len(names) - 1)
        columns = [_merged([(group_of[index], part) for index, part in block]) for block in self.columns]
        return Segments(tuple(names), tuple(sizes), tuple(columns))

    def split(self, blocks: Sequence[Tensor]) -> list[list[Tensor]]:
        """Return the columns of each segment in each block [.., c_b] that has some, or none of the first block."""
        parts: list[list[Tensor]] = [[] for _ in self.names]
        for index, block in enumerate(blocks):
            for segment, part in self.of(block, index):
                parts[segment].append(part)
        # A segment may be on other ranks only.
        return [part or [blocks[0][..., :0]] for part in parts]

    def of(self, block: Tensor, index: int) -> list[tuple[int, Tensor]]:
        """Return the columns of each segment in block number ``index``, [.., c], views of it."""
        return [(segment, block[..., part]) for segment, part in self.columns[index]]


def _cut(columns: Columns, start: int, stop: int) -> Columns:
    """Return the columns from ``start`` to ``stop``, counted from there."""
    parts = [(index, max(part.start, start), min(part.stop, stop)) for index, part in columns]
    return tuple((index, slice(low - start, high - start)) for index, low, high in parts if low < high)


def _merged(columns: Sequence[tuple[int, slice]]) -> Columns:
    """Merge neighbours of one segment."""
    merged: list[tuple[int, slice]] = []
    for index, part in columns:
        if merged and merged[-1][0] == index and merged[-1][1].stop == part.start:
            merged[-1] = (index, slice(merged[-1][1].start, part.stop))
        else:
            merged.append((index, part))
    return tuple(merged)
