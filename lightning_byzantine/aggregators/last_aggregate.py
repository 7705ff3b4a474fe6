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
        self._plain: Tensor | None = None

    def clear(self) -> None:
        """Reset the parts to the state before the first call."""
        self.parts.clear()

    def keep_parts(self, parts: Mapping[str, Tensor]) -> None:
        """Keep a copy of the result on some parameters, [n] by name."""
        copy_into(self.parts, parts)

    def keep(self, aggregate: Tensor) -> None:
        """Keep a copy of the result on a plain tensor, [d]."""
        self._plain = aggregate.clone()

    def blocks_for(self, vectors: Tensor) -> list[Tensor] | None:
        """Return the previous result on a plain tensor as one block, None before the first call.

        Args:
            vectors: [m, d].

        Raises:
            ValueError: if d has changed.

        """
        if self._plain is None:
            return None
        if len(self._plain) != vectors.shape[1]:
            raise ValueError(
                f"vectors must have as many columns as in the previous call, from whose result the rule starts,"
                f" got {vectors.shape[1]} after {len(self._plain)}: use one rule for each size"
            )
        return [self._plain.to(vectors)]

    def get_extra_state(self) -> dict[str, Tensor]:
        """Return both results, the plain one without a name."""
        return self.parts | ({} if self._plain is None else {_PLAIN: self._plain})

    def set_extra_state(self, state: Mapping[str, Tensor] | Tensor | None) -> None:
        """Restore both results; before there were parts, the state was the plain result alone."""
        values = state if isinstance(state, Mapping) else {} if state is None else {_PLAIN: state}
        self.parts = {name: torch.as_tensor(value).clone() for name, value in values.items()}
        self._plain = self.parts.pop(_PLAIN, None)
