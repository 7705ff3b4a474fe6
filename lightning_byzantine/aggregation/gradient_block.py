"""One block of the gradient, such as a bucket of DDP."""

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from lightning_byzantine.matrix import Names

__all__ = ["GradientBlock"]


@dataclass
class GradientBlock:
    """Some parameters' gradients in one flat buffer, which the aggregated gradient overwrites.

    Args:
        names: the parameters, in order; None for a frozen one.
        sizes: number of elements of each.
        buffer: [c], this process's gradient.

    Attributes:
        sent: [k, c], vectors that the k workers of this process send.

    """

    names: Names
    sizes: list[int]
    buffer: Tensor
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

    def parts(self, *buffers: Tensor) -> Iterable[tuple[Any, ...]]:
        """Return each parameter's name with its part of each buffer, along the last dimension."""
        return zip(self.names, *(torch.split(buffer, self.sizes, dim=-1) for buffer in buffers), strict=True)

    def by_name(self, buffer: Tensor) -> dict[str, Tensor]:
        """Return each parameter's part of a buffer, without frozen parameters."""
        return {name: part for name, part in self.parts(buffer) if name is not None}
