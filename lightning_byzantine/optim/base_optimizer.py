"""Checks of the optimizer that double momentum wraps."""

from typing import Any

import torch
from torch.optim import Optimizer

__all__ = ["check_base", "check_dtypes"]


def check_base(base: Any, refused: tuple[type[Optimizer], ...]) -> None:
    """Raise :class:`TypeError` unless ``base`` is an optimizer of float32 or float64 parameters that can be wrapped.

    Args:
        base: the optimizer.
        refused: optimizers that need more than one gradient a step, or a sparse one.

    Example:
        >>> from torch.optim import LBFGS
        >>> check_base(LBFGS([torch.ones(1)]), refused=(LBFGS,))
        Traceback (most recent call last):
        ...
        TypeError: base must take one dense gradient a step, which LBFGS does not

    """
    if not isinstance(base, Optimizer):
        raise TypeError(f"base must be a torch.optim.Optimizer, such as SGD(model.parameters()), got {base!r}")
    if isinstance(base, refused):
        raise TypeError(f"base must take one dense gradient a step, which {type(base).__name__} does not")
    check_dtypes(base.param_groups)


def check_dtypes(param_groups: list[dict[str, Any]]) -> None:
    """Raise :class:`TypeError` unless all parameters are float32 or float64."""
    for group in param_groups:
        for named in group["params"]:
            parameter = named[1] if isinstance(named, tuple) else named
            if parameter.dtype not in (torch.float32, torch.float64):
                raise TypeError(
                    f"DoubleMomentum needs parameters of float32 or float64, got {parameter.dtype}, in which its small"
                    " steps are lost to rounding. With Lightning, use precision='bf16-mixed' or '16-mixed'."
                )
