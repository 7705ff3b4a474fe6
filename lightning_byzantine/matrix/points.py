"""Vectors that rules speak of before anybody computes them."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from torch import Tensor

if TYPE_CHECKING:
    from lightning_byzantine.matrix.worker_matrix import WorkerMatrix

__all__ = ["Combination", "Coordinatewise", "Point"]


@dataclass(frozen=True)
class Combination:
    """A point sum_i w_i x_i, not yet computed.

    Args:
        weights: [n] float64 on the CPU, one for each stored row.
        is_affine: whether the sum of the weights is 1. Otherwise 0 has the rest of it.

    """

    weights: Tensor
    is_affine: bool = True


class Coordinatewise:
    """A point whose every coordinate is a function of the workers' values of it, not yet computed.

    Args:
        matrix: the rows.
        function: maps m rows [m, c] (float32, or float64 for float64 blocks), which it may overwrite, to [c].

    """

    def __init__(self, matrix: "WorkerMatrix", function: Callable[[Tensor], Tensor]) -> None:
        self.matrix = matrix
        self.function = function
        self.values: list[Tensor] | None = None


#: A vector in R^d: weights of rows, a function of rows, or one [c_b] tensor for each column block.
Point = Combination | Coordinatewise | list[Tensor]
