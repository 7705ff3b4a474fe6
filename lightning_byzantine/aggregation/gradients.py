"""Memory order, loss scale and clipping of raw gradients."""

from collections.abc import Callable

import torch
from torch import Tensor, nn

from lightning_byzantine.utilities.torch_internals import is_non_overlapping_and_dense_or_false

__all__ = ["clipped", "clipping_factor", "flat_size", "flattened", "unscaled"]


def flat_size(parameter: Tensor) -> int:
    """Return the n of :func:`flattened`.

    Example:
        >>> flat_size(torch.zeros(3)), flat_size(torch.zeros(3, dtype=torch.cfloat))
        (3, 6)

    """
    return parameter.numel() * (2 if parameter.is_complex() else 1)


def flattened(gradient: Tensor, parameter: Tensor) -> Tensor:
    """Return the gradient as [n], in the memory order of the parameter, as in DDP's buckets.

    With ``torch.channels_last``, this differs from the order of indices. A complex number is two real ones. A sparse
    gradient becomes dense.

    Example:
        >>> flattened(torch.tensor([[1.0, 2.0], [3.0, 4.0]]), parameter=torch.zeros(2, 2).T)
        tensor([1., 3., 2., 4.])
        >>> flattened(torch.tensor([1 + 2j]), parameter=torch.tensor([0j]))
        tensor([1., 2.])

    """
    if gradient.is_sparse:
        gradient = gradient.to_dense()
    if gradient.is_complex():
        return torch.view_as_real(_in_memory_order(gradient.resolve_conj(), parameter)).flatten()
    return _in_memory_order(gradient, parameter)


def _in_memory_order(gradient: Tensor, parameter: Tensor) -> Tensor:
    if parameter.is_contiguous() or not is_non_overlapping_and_dense_or_false(parameter):
        return gradient.flatten()
    flat = gradient.new_empty(gradient.numel())
    flat.as_strided(parameter.shape, parameter.stride()).copy_(gradient)
    return flat


def unscaled(gradient: Tensor, scale: float | None) -> Tensor:
    """Return the gradient without the loss scale, in float32 or float64: half precision is too coarse to sum steps.

    Args:
        gradient: [n].
        scale: the factor that the loss was multiplied by; None for none.

    Example:
        >>> unscaled(torch.tensor([512.0], dtype=torch.float16), scale=1024.0)
        tensor([0.5000])

    """
    gradient = gradient.to(torch.promote_types(gradient.dtype, torch.float32))
    return gradient if scale is None else gradient / scale


def clipping_factor(
    gradients: list[Tensor], max_norm: float, whole_norm: Callable[[Tensor], Tensor] = lambda norm: norm
) -> Tensor:
    """Return min(1, max_norm / (norm + 1e-6)), as in :func:`torch.nn.utils.clip_grad_norm_`, a tensor [].

    NaN if the norm overflows, so that all ranks drop this gradient instead of taking it for 0.

    Args:
        gradients: [n] each, together one vector; empty for the vector 0.
        max_norm: norm to clip to.
        whole_norm: returns the norm of a vector, given that of the part of it that is on this rank.

    Example:
        >>> clipping_factor([torch.tensor([3.0]), torch.tensor([4.0])], max_norm=1.0)
        tensor(0.2000)

    """
    norm = whole_norm(nn.utils.get_total_norm(gradients))
    return torch.where(norm.isfinite(), (max_norm / (norm + 1e-6)).clamp(max=1.0), torch.nan)


def clipped(gradients: dict[str, Tensor], max_norm: float) -> dict[str, Tensor]:
    """Return one worker's gradients, [n] by parameter name, clipped together by :func:`clipping_factor`.

    Example:
        >>> clipped({"weight": torch.tensor([3.0, 4.0])}, max_norm=10.0)
        {'weight': tensor([3., 4.])}

    """
    # Sorted by name, so that the last digit does not depend on the order.
    factor = clipping_factor([gradients[name] for name in sorted(gradients)], max_norm)
    return {name: gradient * factor for name, gradient in gradients.items()}
