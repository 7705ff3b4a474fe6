"""Vectors of which each rank of a worker holds an equal slice."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from lightning_byzantine.exchange import Shards
from lightning_byzantine.exchange.collectives import gather_rows

__all__ = ["Slices"]


@dataclass(frozen=True)
class Slices:
    """Slices of each parameter, not of DDP's buckets, which it rebuilds after the first step.

    Of g ranks, each holds ceil(d / g) neighbouring elements of a parameter's d, in the order of ranks; the last ones
    hold fewer, or none.

    Args:
        sizes: d of each parameter, by name.
        shards: the ranks.

    """

    sizes: Mapping[str, int]
    shards: Shards

    @property
    def num_ranks(self) -> int:
        """Number of ranks of a worker, g."""
        return dist.get_world_size(self.shards.within)

    def num_columns(self, name: str) -> int:
        """Return the size of this rank's slice."""
        return len(range(self.sizes[name])[self._place(name)])

    def start(self, name: str) -> int:
        """Return which element of a parameter is the first one of this rank's slice."""
        return min(self.shards.index * self._width(name), self.sizes[name])

    def part_of_whole(self, name: str, whole: Tensor) -> Tensor:
        """Return this rank's slice of a whole vector [d], as a view."""
        return whole[self._place(name)]

    def whole(self, name: str, part: Tensor) -> Tensor:
        """Return the whole vector [d] of one parameter; on all ranks of the worker."""
        return self.wholes([name], [part])[0]

    def wholes(self, names: Sequence[str], parts: Sequence[Tensor]) -> list[Tensor]:
        """Return those of several parameters of one dtype, by one collective."""
        widths = [self._width(name) for name in names]
        padded = torch.cat(
            [torch.nn.functional.pad(part, (0, width - len(part))) for part, width in zip(parts, widths, strict=True)]
        )
        columns = torch.split(gather_rows(padded, self.shards.within), widths, dim=1)
        return [rows.reshape(-1)[: self.sizes[name]] for name, rows in zip(names, columns, strict=True)]

    def _width(self, name: str) -> int:
        return -(-self.sizes[name] // self.num_ranks)

    def _place(self, name: str) -> slice:
        return slice(self.start(name), self.start(name) + self._width(name))
