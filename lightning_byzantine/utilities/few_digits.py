"""Numbers without the digits that depend on the order of sums."""

from math import frexp, isfinite, ldexp

import torch
from torch import Tensor

__all__ = ["in_few_digits", "rounded"]

# Binary digits that are kept: sums over columns agree in far more, however DDP and the exchange have cut these.
_DIGITS = 8


def in_few_digits(value: float) -> float:
    """Round to eight binary digits.

    Example:
        >>> in_few_digits(3.14159), in_few_digits(3.14160), in_few_digits(1e-200 / 3) > 0
        (3.140625, 3.140625, True)

    """
    if not isfinite(value):
        return value
    mantissa, exponent = frexp(value)
    return ldexp(round(ldexp(mantissa, _DIGITS)), exponent - _DIGITS)


def rounded(values: Tensor, digits: int) -> Tensor:
    """Round a tensor to some binary digits, on its device.

    Example:
        >>> rounded(torch.tensor([3.14159, 3.14160], dtype=torch.float64), digits=8)
        tensor([3.1406, 3.1406], dtype=torch.float64)

    """
    mantissas, exponents = values.frexp()
    return torch.where(values.isfinite(), ((mantissas * 2**digits).round() / 2**digits).ldexp(exponents), values)
