"""Vectors that are computed lazily, such as the results of rules."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from lightning_byzantine.matrix.row_view import RowView, weighted_sum
from lightning_byzantine.matrix.scratch import Scratch

__all__ = ["Combination", "Coordinatewise", "Given", "LazyPoint", "Measurement", "Point", "as_lazy"]

# Relative error of a squared distance that is summed in float32 over one chunk: a multiple of float32's rounding.
_ROUNDING_OF_NORMS = 16 * 2.0**-24


class LazyPoint(ABC):
    """A vector in R^d that is computed on request, and its distances from rows."""

    @abstractmethod
    def values(self, view: RowView) -> list[Tensor]:
        """Return one [c_b] tensor for each block, in float32 or float64.

        Args:
            view: any view of the rows from which the point was computed.

        """

    def exact_squared_distances(self, view: RowView) -> Tensor:
        """Return ||x_i - point||^2 of the rows of a view, [m] float64, accurate to float64: in one pass."""
        values = self.values(view)

        def statistic(chunk: Tensor, at: Callable[[list[Tensor]], Tensor]) -> Tensor:
            return (chunk - at(values).double()).square().sum(1)

        return view.sum_over_columns(statistic)

    def squared_distances(self, view: RowView) -> tuple[Tensor, Tensor]:
        """Return the same as quickly as possible, with bounds of the rounding errors: two [m]."""
        squared = self.exact_squared_distances(view)
        return squared, torch.zeros_like(squared)


@dataclass(frozen=True)
class Combination(LazyPoint):
    """A point sum_i w_i x_i, whose distances follow from inner products without another pass over the columns.

    Args:
        weights: [n] float64 on the CPU, one for each row that the view may read.
        is_affine: whether the weights sum to 1. Otherwise 0 has the remaining weight.

    """

    weights: Tensor
    is_affine: bool = True

    def values(self, view: RowView) -> list[Tensor]:
        """Return the weighted sum of the rows, in one pass."""
        return view.compute(lambda chunk, out: weighted_sum(chunk, self.weights, out))

    def squared_distances(self, view: RowView) -> tuple[Tensor, Tensor]:
        """Return squared distances and their errors, from inner products."""
        gram = view.products.serving(self.is_affine).gram
        return gram.mixed(view.weights - self.weights).squared_norms()

    def exact_squared_distances(self, view: RowView) -> Tensor:
        """Return squared distances, from inner products accurate to float64."""
        gram = view.products.serving(self.is_affine).exact_gram
        return gram.mixed(view.weights - self.weights).squared_norms()[0]


class Given(LazyPoint):
    """A point whose values are known.

    Args:
        blocks: one [c_b] tensor for each column block.

    """

    def __init__(self, blocks: Sequence[Tensor]) -> None:
        self._blocks = list(blocks)

    def values(self, view: RowView) -> list[Tensor]:
        """Return the values."""
        return self._blocks


class Coordinatewise(LazyPoint):
    """A point of which each coordinate is a function of the workers' values of that coordinate.

    Args:
        made_of: the rows.
        function: maps m rows [m, c] (float32, or float64 for float64 blocks) to [c].
        overwrites: whether the function may write to its input, which is then a copy.
        values: one [c_b] tensor for each block, if already computed.

    """

    def __init__(
        self,
        made_of: RowView,
        function: Callable[[Tensor], Tensor],
        overwrites: bool = True,
        values: list[Tensor] | None = None,
    ) -> None:
        self._made_of = made_of
        self._function = function
        self._overwrites = overwrites
        self._values = values

    def values(self, view: RowView) -> list[Tensor]:
        """Return the function's values, computed once, in one pass."""
        if self._values is None:
            scratch = Scratch()
            self._values = self._made_of.compute(lambda chunk, out: out.copy_(self._at(chunk, scratch)))
        return self._values

    def squared_distances(self, view: RowView) -> tuple[Tensor, Tensor]:
        """Return squared distances and their errors, in the pass that computes the values unless they are known."""
        # The point may have been computed without some rows whose distances from it are still needed.
        same_rows = torch.equal(view.rows, self._made_of.rows)
        if self._values is not None or not view.blocks.are_quick or not same_rows:
            return super().squared_distances(view)
        norms, scratch, differences = [], Scratch(), Scratch()

        def measure(chunk: Tensor, out: Tensor) -> None:
            out.copy_(self._at(chunk, scratch))
            difference = torch.sub(view.mixed(chunk, scratch), out, out=differences.rows(view.num_rows, chunk))
            # Float32 within a chunk, float64 over the chunks.
            norms.append(torch.linalg.vector_norm(difference, dim=1))

        self._values = view.compute(measure)
        squared = torch.stack(norms).double().square()
        sums = view.blocks.complete(torch.stack([squared.sum(0), squared.square().sum(0)]))
        return sums[0], _ROUNDING_OF_NORMS * sums[1].sqrt()

    def _at(self, chunk: Tensor, scratch: Scratch) -> Tensor:
        rows = self._made_of.writable(chunk, scratch) if self._overwrites else self._made_of.mixed(chunk, scratch)
        return self._function(rows)


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


#: What a rule may return: weights of rows, a function of rows, or one [c_b] tensor for each column block.
Point = LazyPoint | list[Tensor]


def as_lazy(point: Point) -> LazyPoint:
    """Return the point as a :class:`LazyPoint`."""
    return Given(point) if isinstance(point, list) else point
