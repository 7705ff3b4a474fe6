"""Numbers without the digits that depend on the order of sums."""

from math import frexp, isfinite, ldexp

__all__ = ["in_few_digits"]

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
