"""What a first look at the rows finds out."""

from dataclasses import dataclass

import torch
from torch import Tensor

from lightning_byzantine.matrix.points import Coordinatewise

__all__ = ["Measurement", "largest_squared_norm"]

# Largest squared norm of float64 rows: sums of squared distances over the workers must not overflow either.
_LARGEST_SQUARED_NORM = 1e300


@dataclass(frozen=True)
class Measurement:
    """Which rows a rule can use, and what else came of the pass that told.

    Args:
        is_measurable: [m] bool: rows that are finite and whose squared norm does not overflow.
        norms: [m] float64, ||x_i||; NaN where the pass did not need them.
        point: what was asked for along with it, computed; of use if all rows are measurable.

    """

    is_measurable: Tensor
    norms: Tensor
    point: Coordinatewise | None = None

    @classmethod
    def by(cls, squared_norms: Tensor, largest: float, point: Coordinatewise | None = None) -> "Measurement":
        """Return what squared norms, [m], say, given the largest that can be computed with."""
        return cls(squared_norms.isfinite() & (squared_norms <= largest), squared_norms.sqrt(), point)

    @classmethod
    def all_good(cls, num_rows: int, point: Coordinatewise) -> "Measurement":
        """Return that all rows are measurable, though nobody knows their norms."""
        unknown = torch.full((num_rows,), torch.nan, dtype=torch.float64)
        return cls(torch.ones(num_rows, dtype=torch.bool), unknown, point)


def largest_squared_norm(dtypes: list[torch.dtype]) -> float:
    """Return the limit for rows of these dtypes, which are at least float32."""
    widest = max(dtypes, key=lambda dtype: dtype.itemsize)
    return min(torch.finfo(widest).max, _LARGEST_SQUARED_NORM)
