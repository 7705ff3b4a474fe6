"""Temporary values and gradients of parameters."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from torch import Tensor

__all__ = ["swapped"]


@contextmanager
def swapped(parameters: Sequence[Tensor], attribute: str, values: Sequence[Tensor | None]) -> Iterator[None]:
    """Let each parameter have other data or another gradient within the block; nothing is copied.

    Args:
        parameters: get their own back at the end.
        attribute: "data" to share the memory of other tensors, "grad" to have other gradients.
        values: one for each parameter, of its shape, dtype and device; None for no gradient.

    Example:
        >>> import torch
        >>> parameter, value = torch.ones(1), torch.zeros(1)
        >>> with swapped([parameter], "data", [value]):
        ...     _ = parameter.add_(5)
        >>> parameter, value
        (tensor([1.]), tensor([5.]))

    """
    originals = [getattr(parameter, attribute) for parameter in parameters]
    try:
        for parameter, value in zip(parameters, values, strict=True):
            setattr(parameter, attribute, value)
        yield
    finally:
        for parameter, original in zip(parameters, originals, strict=True):
            setattr(parameter, attribute, original)
