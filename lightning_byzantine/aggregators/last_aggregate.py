"""What a rule has to remember of the call before."""

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from lightning_byzantine.utilities.copying import copy_into

__all__ = ["LastAggregate"]

_PLAIN = ""  # what a plain tensor goes by


class LastAggregate(nn.Module):
    """The result of a rule's last call, by parameter name, or on a plain tensor; part of the rule's ``state_dict``.

    Attributes:
        parts: [n] by parameter name; empty before the first call.

    Example:
        >>> last = LastAggregate()
        >>> last.keep(torch.tensor([1.0, 2.0]))
        >>> last.blocks_for(torch.zeros(3, 2))
        [tensor([1., 2.])]

    """

    def __init__(self) -> None:
        super().__init__()
        # Not buffers, since there are none before the first call.
        self.parts: dict[str, Tensor] = {}

    def clear(self) -> None:
        """Forget it: the next call is the first one."""
        self.parts.clear()

    def keep_parts(self, parts: Mapping[str, Tensor]) -> None:
        """Remember copies of some parameters' parts, [n] by name."""
        copy_into(self.parts, parts)

    def keep(self, aggregate: Tensor) -> None:
        """Remember a copy of a plain result, [d]."""
        self.parts = {_PLAIN: aggregate.clone()}

    def blocks_for(self, vectors: Tensor) -> list[Tensor] | None:
        """Return the last plain result as the only block of a matrix of these rows, None before the first call.

        Args:
            vectors: [m, d].

        Raises:
            ValueError: if d is not what it was.

        """
        value = self.parts.get(_PLAIN)
        if value is None:
            return None
        if len(value) != vectors.shape[1]:
            raise ValueError(
                f"vectors must have as many columns as in the call before, of which the rule remembers the result,"
                f" got {vectors.shape[1]} after {len(value)}: make a rule for each size"
            )
        return [value.to(vectors)]

    def get_extra_state(self) -> dict[str, Tensor]:
        """Return the last result."""
        return dict(self.parts)

    def set_extra_state(self, state: Mapping[str, Tensor]) -> None:
        """Continue after that result."""
        self.parts = {name: torch.as_tensor(value).clone() for name, value in state.items()}
