"""State that belongs to the columns of the aggregate which a rank has."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

__all__ = ["Columns", "SharedColumns"]


@dataclass(frozen=True)
class Columns:
    """Which columns of the aggregate this rank has: all of them, or its share.

    Args:
        own: for each block of the aggregate, a slice of each parameter in it, by name, in order.
        like: for each block, a tensor [c] of its size, with padding after these slices, and of the state's dtype.
        gather: returns all columns of some parameters, given this rank's. Must be called on all ranks, with the same
            parameters.

    """

    own: Sequence[Mapping[str, slice]]
    like: Sequence[Tensor]
    gather: Callable[[Mapping[str, Tensor]], dict[str, Tensor]]


class SharedColumns:
    """Tensors by parameter name, in the columns of the aggregate that this rank has; whole until it is known which.

    Attributes:
        blocks: [c], the values for each block of the aggregate, 0 where there are none yet.
        parts: [n], by parameter name: views of these.

    Example:
        >>> state = SharedColumns()
        >>> state.load({"weight": torch.tensor([1.0, 2.0])})
        >>> whole = {"weight": torch.tensor([1.0, 2.0])}
        >>> state.place(Columns([{"weight": slice(1, 2)}], [torch.empty(1)], gather=lambda parts: whole))
        >>> state.parts, state.whole()
        ({'weight': tensor([2.])}, {'weight': tensor([1., 2.])})

    """

    def __init__(self) -> None:
        self.blocks: list[Tensor] = []
        self.parts: dict[str, Tensor] = {}
        self._columns: Columns | None = None
        self._places: dict[str, Tensor] = {}  # where in the blocks the values for each parameter are

    def place(self, columns: Columns) -> None:
        """Change the columns; a collective if these were others before, as after DDP has rebuilt its buckets."""
        if columns is not self._columns:
            wholes, self._columns = self.whole(), columns
            self.blocks = [like.new_zeros(like.shape) for like in columns.like]
            self._places = self._views()
            self.load(wholes)

    def keep(self, name: str, values: Tensor) -> None:
        """Copy new values [n] for one parameter."""
        if name not in self.parts:
            self.parts[name] = self._places.get(name, torch.empty_like(values))
        self.parts[name].copy_(values)

    def whole(self) -> dict[str, Tensor]:
        """Return all columns of each parameter, the same on every rank; a collective if ranks have a share each."""
        if self._columns is None:
            return dict(self.parts)
        placed = self._places.keys() & self.parts.keys()
        return self.parts | self._columns.gather({name: self.parts[name] for name in placed})

    def load(self, wholes: Mapping[str, Tensor]) -> None:
        """Keep copies of this rank's columns of whole tensors."""
        blocks = [] if self._columns is None else self._columns.own
        own = {name: part for block in blocks for name, part in block.items()}
        self.parts = {}
        for values in self.blocks:
            values.zero_()
        for name, whole in wholes.items():
            self.keep(name, whole[own[name]] if name in own else whole)

    def to(self, device: torch.device) -> None:
        """Move all values to a device."""
        others = {name: part.to(device) for name, part in self.parts.items() if name not in self._places}
        self.blocks = [block.to(device) for block in self.blocks]
        self._places = self._views()
        places = self._places | others
        self.parts = {name: places[name] for name in self.parts}

    def clear(self) -> None:
        """Forget all values, and which columns this rank has."""
        self.blocks, self.parts, self._places, self._columns = [], {}, {}, None

    def _views(self) -> dict[str, Tensor]:
        places: dict[str, Tensor] = {}
        for own, block in zip([] if self._columns is None else self._columns.own, self.blocks, strict=True):
            sizes = [part.stop - part.start for part in own.values()]
            places |= zip(own, torch.split(block[: sum(sizes)], sizes), strict=True)
        return places
