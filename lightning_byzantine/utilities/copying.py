"""Values that are kept from step to step."""

from collections.abc import Mapping

from torch import Tensor

__all__ = ["copy_into"]


def copy_into(state: dict[str, Tensor], values: Mapping[str, Tensor]) -> None:
    """Copy values to where they are kept, into the same memory each time.

    Args:
        state: what is kept; entries that are not among the values stay.
        values: tensors by name.

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
