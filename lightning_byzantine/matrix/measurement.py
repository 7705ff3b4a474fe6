"""The result of the first pass over the rows."""

from dataclasses import dataclass

from torch import Tensor

from lightning_byzantine.matrix.points import Coordinatewise

__all__ = ["Measurement"]


@dataclass(frozen=True)
class Measurement:
    """Which rows a rule can use, and what else the same pass has computed.

    Args:
        is_measurable: [m] bool: rows that are finite and whose squared norm does not overflow.
        norms: [m] float64, ||x_i||; NaN if the pass did not compute them.
        point: the point that the same pass has computed, valid if all rows are measurable.

    """

    is_measurable: Tensor
    norms: Tensor
    point: Coordinatewise | None = None
