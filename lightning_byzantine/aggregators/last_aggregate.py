"""The state of rules that start from the previous aggregate."""

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from lightning_byzantine.utilities.copying import copy_into

__all__ = ["LastAggregate"]

_PLAIN = ""  # key of the result on a plain tensor


class LastAggregate(nn.Module):
    """The result of a rule's previous call, on parameters or on a plain tensor; part of the rule's ``state_dict``.

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
        """Reset to the state before the first call."""
        self.parts.clear()

    def keep_parts(self, parts: Mapping[str, Tensor]) -> None:
        """Keep a copy of the result on some parameters, [n] by name."""
        copy_into(self.parts, parts)

    def keep(self, aggregate: Tensor) -> None:
        """Keep a copy of the result on a plain tensor, [d]."""
        self.parts = {_PLAIN: aggregate.clone()}

    def blocks_for(self, vectors: Tensor) -> list[Tensor] | None:
        """Return the previous result on a plain tensor as one block, None before the first call.

        Args:
            vectors: [m, d].

        Raises:
            ValueError: if d has changed.

        """
        value = self.parts.get(_PLAIN)
        if value is None:
            return None
        if len(value) != vectors.shape[1]:
            raise ValueError(
                f"vectors must have as many columns as in the previous call, from whose result the rule starts,"
                f" got {vectors.shape[1]} after {len(value)}: use one rule for each size"
            )
        return [value.to(vectors)]

    def get_extra_state(self) -> dict[str, Tensor]:
        """Return the last result."""
        return dict(self.parts)

    def set_extra_state(self, state: Mapping[str, Tensor]) -> None:
        """Restore the last result."""
        self.parts = {name: torch.as_tensor(value).clone() for name, value in state.items()}
