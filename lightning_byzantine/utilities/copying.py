"""State that is updated in place."""

from collections.abc import Mapping

from torch import Tensor

__all__ = ["copy_into"]


def copy_into(state: dict[str, Tensor], values: Mapping[str, Tensor]) -> None:
    """Update ``state`` with copies of ``values``, reusing its memory.

    Args:
        state: tensors by name; those without a new value stay.
        values: the new values by name.

    Example:
        >>> import torch
        >>> state = {}
        >>> copy_into(state, {"weight": torch.ones(1)})
        >>> state
        {'weight': tensor([1.])}

    """
    for name, value in values.items():
        if name in state and state[name].device == value.device:
            state[name].copy_(value)
        else:
            state[name] = value.clone()
