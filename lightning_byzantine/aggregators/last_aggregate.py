"""What a rule has to remember of the call before."""

import torch
from torch import Tensor, nn

__all__ = ["LastAggregate"]


class LastAggregate(nn.Module):
    """The result of a rule's last call on a plain tensor; part of the rule's ``state_dict``.

    Under the strategy, which keeps it in the checkpoint by parameter, this one stays empty.

    Example:
        >>> last = LastAggregate()
        >>> last.keep(torch.tensor([1.0, 2.0]))
        >>> last.blocks_for(torch.zeros(3, 2))
        [tensor([1., 2.])]

    """

    def __init__(self) -> None:
        super().__init__()
        # Not a buffer, since there is none before the first call.
        self._value: Tensor | None = None

    def keep(self, aggregate: Tensor) -> None:
        """Remember a result, [d]."""
        self._value = aggregate.clone()

    def blocks_for(self, vectors: Tensor) -> list[Tensor] | None:
        """Return the last result as the only block of a matrix of these rows, None before the first call.

        Args:
            vectors: [m, d].

        Raises:
            ValueError: if d is not what it was.

        """
        if self._value is None:
            return None
        if len(self._value) != vectors.shape[1]:
            raise ValueError(
                f"vectors must have as many columns as in the call before, of which the rule remembers the result,"
                f" got {vectors.shape[1]} after {len(self._value)}: make a rule for each size"
            )
        return [self._value.to(vectors)]

    def get_extra_state(self) -> Tensor | None:
        """Return the last result."""
        return self._value

    def set_extra_state(self, state: Tensor | None) -> None:
        """Continue after that result."""
        self._value = None if state is None else torch.as_tensor(state).clone()
