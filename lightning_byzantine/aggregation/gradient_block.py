"""One block of the gradient, such as a bucket of DDP."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from itertools import accumulate, pairwise
from typing import Any

import torch
from torch import Tensor

from lightning_byzantine.matrix import Names

__all__ = ["GradientBlock"]


@dataclass
class GradientBlock:
    """Some parameters' gradients in one flat buffer, which the aggregated gradient overwrites.

    Args:
        names: the parameters, in order.
        sizes: number of elements of each.
        buffer: [c], this process's gradient.
        starts: by name, which element of a parameter is the first one here, if the rank has a part of it; others are
            whole.

    Attributes:
        unused: parameters that take no part in this step, because no worker has used them.
        sent: [k, c], vectors that the k workers of this process send.

    """

    names: tuple[str, ...]
    sizes: list[int]
    buffer: Tensor
    starts: Mapping[str, int] = field(default_factory=dict)
    unused: frozenset[str] = field(default=frozenset(), init=False)
    sent: Tensor = field(init=False)

    @classmethod
    def of(cls, gradients: dict[str, Tensor]) -> "GradientBlock":
        """Return a block with a copy of flat gradients, given by parameter name.

        Example:
            >>> block = GradientBlock.of({"weight": torch.ones(2), "bias": torch.zeros(1)})
            >>> block.buffer, block.sizes
            (tensor([1., 1., 0.]), [2, 1])

        """
        flat = list(gradients.values())
        return cls(tuple(gradients), [gradient.numel() for gradient in flat], torch.cat(flat))

    def columns(self, columns: slice) -> "GradientBlock":
        """Return the block of some neighbouring columns, of the same parameters, of which some may have none there.

        Example:
            >>> part = GradientBlock.of({"weight": torch.ones(2), "bias": torch.zeros(3)}).columns(slice(1, 3))
            >>> part.names, part.sizes, part.buffer
            (('weight', 'bias'), [1, 1], tensor([1., 0.]))

        """
        sizes = [place.stop - place.start for place in self.places(columns).values()]
        block = GradientBlock(self.names, sizes, self.buffer[columns])
        block.unused = self.unused
        return block

    def places(self, columns: slice) -> dict[str, slice]:
        """Return which elements of each parameter are in some neighbouring columns."""
        stops = [0, *accumulate(self.sizes)]
        places = {}
        for name, (start, stop) in zip(self.names, pairwise(stops), strict=True):
            low, high = (min(max(end, start), stop) - start for end in (columns.start, columns.stop))
            places[name] = slice(low, high)
        return places

    @property
    def layout(self) -> Names:
        """The parameters, in order; None for one that takes no part in this step."""
        return tuple(None if name in self.unused else name for name in self.names)

    @property
    def unused_columns(self) -> Tensor:
        """Which columns belong to parameters that take no part in this step, [c] bool."""
        is_unused = torch.tensor([name in self.unused for name in self.names], device=self.buffer.device)
        return is_unused.repeat_interleave(torch.tensor(self.sizes, device=self.buffer.device))

    def parts(self, *buffers: Tensor) -> Iterable[tuple[Any, ...]]:
        """Return each used parameter's name with its part of each buffer, along the last dimension."""
        parts = zip(self.names, *(torch.split(buffer, self.sizes, dim=-1) for buffer in buffers), strict=True)
        return (part for part in parts if part[0] not in self.unused)

    def by_name(self, buffer: Tensor) -> dict[str, Tensor]:
        """Return each used parameter's part of a buffer."""
        return dict(self.parts(buffer))
