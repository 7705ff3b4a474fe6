"""What a first look at the rows finds out."""

from dataclasses import dataclass

from torch import Tensor

from lightning_byzantine.matrix.points import Coordinatewise

__all__ = ["Measurement"]


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
