"""Temporary values and gradients of parameters."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from torch import Tensor

__all__ = ["swapped_data", "swapped_gradients"]


@contextmanager
def swapped_data(parameters: Sequence[Tensor], values: Sequence[Tensor]) -> Iterator[None]:
    """Let each parameter share the memory of another tensor within the block; nothing is copied.

    Args:
        parameters: get their own memory back at the end.
        values: one for each parameter, of its shape, dtype and device.

    Example:
        >>> import torch
        >>> parameter, value = torch.ones(1), torch.zeros(1)
        >>> with swapped_data([parameter], [value]):
        ...     _ = parameter.add_(5)
        >>> parameter, value
        (tensor([1.]), tensor([5.]))

    """
    originals = [parameter.data for parameter in parameters]
    try:
        for parameter, value in zip(parameters, values, strict=True):
            parameter.data = value
        yield
    finally:
        for parameter, original in zip(parameters, originals, strict=True):
            parameter.data = original


@contextmanager
def swapped_gradients(parameters: Sequence[Tensor], gradients: Sequence[Tensor | None]) -> Iterator[None]:
    """Let each parameter have another gradient within the block.

    Args:
        parameters: get their own gradients back at the end.
        gradients: one for each parameter; None for no gradient.

    """
    originals = [parameter.grad for parameter in parameters]
    try:
        for parameter, gradient in zip(parameters, gradients, strict=True):
            parameter.grad = gradient
        yield
    finally:
        for parameter, original in zip(parameters, originals, strict=True):
            parameter.grad = original
