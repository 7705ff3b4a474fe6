"""Which columns of the workers' matrix belong to which parameter."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate

from torch import Tensor

__all__ = ["Group", "Names", "Segments"]

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
        used: indices of the segments that have columns on any rank; the others take no part in this step.
        places: for each of ``columns``, the place of its first one among all parameters' elements, on all ranks
            together, from the last parameter to the first, as DDP has them. Empty if nobody needs it.

    Example:
        >>> segments = Segments.of_sizes([120, 3, 200])
        >>> segments.columns
        (((0, slice(0, 120, None)), (1, slice(120, 123, None)), (2, slice(123, 323, None))),)
        >>> [(group.name, group.size) for group in segments.grouped(least=100)]
        [('0', 123), ('2', 200)]

    """

    names: tuple[str, ...]
    sizes: tuple[int, ...]
    columns: tuple[Columns, ...]
    used: tuple[int, ...]
    places: tuple[tuple[int, ...], ...] = ()

    @classmethod
    def of_sizes(cls, sizes: Sequence[int], widths: Sequence[int] | None = None) -> "Segments":
        """Return segments of neighbouring columns, from left to right, named by their index.

        Args:
            sizes: number of columns of each.
            widths: number of columns of each block; None for a single block.

        Raises:
            ValueError: if the sizes don't add up to the number of columns of all blocks.

        """
        widths = [sum(sizes)] if widths is None else widths
        if sum(sizes) != sum(widths):
            raise ValueError(f"sizes must add up to the number of columns, {sum(widths)}, got {sum(sizes)}")
        names = [str(index) for index in range(len(sizes))]
        whole = cls.of_blocks(dict(zip(names, sizes, strict=True)), [(tuple(names), sizes)])
        stops = list(accumulate(widths))
        return whole._cut([(0, stop - width, stop) for stop, width in zip(stops, widths, strict=True)])

    @classmethod
    def of_blocks(
        cls,
        parameters: Mapping[str, int],
        blocks: Sequence[tuple[Names, Sequence[int]]],
        starts: Mapping[str, int] | None = None,
    ) -> "Segments":
        """Return one segment for each parameter.

        Args:
            parameters: number of elements of all parameters of the module by name, in its order.
            blocks: names and sizes of the parameters in each block, in the order of the columns.
            starts: which element is the first one in the blocks, for parameters of which these have a part; None for 0.

        """
        indices = {name: index for index, name in enumerate(parameters)}
        columns = []
        for names, sizes in blocks:
            stops = list(accumulate(sizes))
            places = zip(names, sizes, stops, strict=True)
            columns.append(tuple((indices[n], slice(stop - size, stop)) for n, size, stop in places if n is not None))
        used = tuple(sorted({index for block in columns for index, _ in block}))
        after = list(accumulate(list(parameters.values())[::-1], initial=0))[-2::-1]
        firsts = [first + (starts or {}).get(name, 0) for name, first in zip(parameters, after, strict=True)]
        of_columns = tuple(tuple(firsts[index] for index, _ in block) for block in columns)
        return cls(tuple(parameters), tuple(parameters.values()), tuple(columns), used, of_columns)

    def shard(self, rank: int, widths: Sequence[int]) -> "Segments":
        """Return the columns of one rank, if block b was divided into shards of ``widths[b]`` columns."""
        return self._cut([(block, rank * width, (rank + 1) * width) for block, width in enumerate(widths)])

    def runs(self, block: int) -> list[tuple[slice, int]]:
        """Return the columns of a block as neighbours that are so in :attr:`places` as well, with the first's place."""
        runs: list[tuple[slice, int]] = []
        for (_, columns), place in zip(self.columns[block], self.places[block], strict=True):
            if runs:
                last, first = runs[-1]
                if last.stop == columns.start and first + last.stop - last.start == place:
                    runs[-1] = slice(last.start, columns.stop), first
                    continue
            runs.append((columns, place))
        return runs

    def _cut(self, ranges: Sequence[tuple[int, int, int]]) -> "Segments":
        """Return, for each (block, start, stop), these columns of the block as one."""
        columns, places = [], []
        for block, start, stop in ranges:
            cut = [
                (index, max(part.start, start), min(part.stop, stop), place - part.start)
                for (index, part), place in zip(self.columns[block], self.places[block], strict=True)
            ]
            kept = [(index, low, high, place + low) for index, low, high, place in cut if low < high]
            columns.append(tuple((index, slice(low - start, high - start)) for index, low, high, _ in kept))
            places.append(tuple(place for *_, place in kept))
        return replace(self, columns=tuple(columns), places=tuple(places))

    def grouped(self, least: int) -> "tuple[Group, ...]":
        """Merge each segment of fewer than ``least`` elements with the one before; the first with those after it.

        Returns:
            the groups of which at least one segment takes part in this step.

        """
        places: list[list[tuple[int, slice]]] = [[] for _ in self.names]
        for block, columns in enumerate(self.columns):
            for segment, part in columns:
                places[segment].append((block, part))
        groups: list[tuple[Group, bool]] = []
        for segment, (name, size, own) in enumerate(zip(self.names, self.sizes, places, strict=True)):
            group, is_used = Group(name, size, tuple(own)), segment in self.used
            if groups and (size < least or groups[-1][0].size < least):
                before, was_used = groups.pop()
                group = Group(before.name, before.size + size, before.places + group.places)
                is_used |= was_used
            groups.append((group, is_used))
        return tuple(group for group, is_used in groups if is_used)


@dataclass(frozen=True)
class Group:
    """One segment, or several that are looked at together.

    Args:
        name: of the first segment.
        size: number of elements, on all ranks together.
        places: where this rank's columns are: pairs of a block's index and columns of it. They are in the order of the
            parameters, so that sums over them do not depend on DDP's buckets.

    """

    name: str
    size: int
    places: tuple[tuple[int, slice], ...]

    def of(self, blocks: Sequence[Tensor]) -> list[Tensor]:
        """Return the columns of blocks [.., c_b], as views; without any on this rank, none of the first block's."""
        return [blocks[index][..., part] for index, part in self.places] or [blocks[0][..., :0]]
