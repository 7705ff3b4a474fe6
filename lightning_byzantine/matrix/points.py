"""Vectors that rules speak of before anybody computes them."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from lightning_byzantine.matrix.blocks import at_least_float32
from lightning_byzantine.matrix.row_view import RowView, weighted_sum
from lightning_byzantine.matrix.scratch import Scratch

__all__ = ["Combination", "Coordinatewise", "Given", "LazyPoint", "Point", "as_lazy"]

# Of a squared distance that is added up in float32 over one chunk: some times the rounding of float32.
_ROUNDING_OF_NORMS = 16 * 2.0**-24


class LazyPoint(ABC):
    """A vector in R^d that knows how to compute itself, and how far rows are from it."""

    @abstractmethod
    def values(self, view: RowView) -> list[Tensor]:
        """Return one [c_b] tensor for each block, in float32 at least.

        Args:
            view: any view of the rows that the point was made of.

        """

    @abstractmethod
    def exact_squared_distances(self, view: RowView) -> Tensor:
        """Return ||x_i - point||^2 of the rows of a view, [m] float64, with all digits."""

    def squared_distances(self, view: RowView) -> tuple[Tensor, Tensor]:
        """Return the same as quickly as possible, and how far rounding may have moved each: two [m]."""
        squared = self.exact_squared_distances(view)
        return squared, torch.zeros_like(squared)


@dataclass(frozen=True)
class Combination(LazyPoint):
    """A point sum_i w_i x_i, whose distances need no pass over the columns beside that of the inner products.

    Args:
        weights: [n] float64 on the CPU, one for each row that the view of it may read.
        is_affine: whether the sum of the weights is 1. Otherwise 0 has the rest of it.

    """

    weights: Tensor
    is_affine: bool = True

    def values(self, view: RowView) -> list[Tensor]:
        """Return the weighted sum of the rows, in one pass."""
        sums = []
        for index, block in enumerate(view.blocks.arriving):
            total = block.new_empty(block.shape[1], dtype=at_least_float32(block.dtype))
            for columns, chunk in view.blocks.chunks(index, view.rows, at_least_float32):
                weighted_sum(chunk, self.weights, out=total[columns])
            sums.append(total)
        return sums

    def squared_distances(self, view: RowView) -> tuple[Tensor, Tensor]:
        """Return squared distances and their errors, from inner products."""
        gram = view.products.serving(self.is_affine).gram
        return gram.mixed(view.weights - self.weights).squared_norms()

    def exact_squared_distances(self, view: RowView) -> Tensor:
        """Return squared distances, from inner products with all digits."""
        gram = view.products.serving(self.is_affine).exact_gram
        return gram.mixed(view.weights - self.weights).squared_norms()[0]


class _PointOfValues(LazyPoint):
    """A point that is not a combination of rows, so that distances take a pass over its values."""

    def exact_squared_distances(self, view: RowView) -> Tensor:
        """Return squared distances, in one pass."""
        values = self.values(view)

        def statistic(chunk: Tensor, at: Callable[[list[Tensor]], Tensor]) -> Tensor:
            return (chunk - at(values).double()).square().sum(1)

        return view.sum_over_columns(statistic)


class Given(_PointOfValues):
    """A point whose values are there.

    Args:
        blocks: one [c_b] tensor for each column block.

    """

    def __init__(self, blocks: Sequence[Tensor]) -> None:
        self._blocks = list(blocks)

    def values(self, view: RowView) -> list[Tensor]:
        """Return the values."""
        return self._blocks


class Coordinatewise(_PointOfValues):
    """A point whose every coordinate is a function of the workers' values of it.

    Args:
        made_of: the rows.
        function: maps m rows [m, c] (float32, or float64 for float64 blocks) to [c].
        overwrites: whether the function may write to its input, which then has to be a copy.
        values: one [c_b] tensor for each block, if they have been computed already.

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
        """Return the function's values, computed in one pass, once."""
        if self._values is None:
            values, scratch = [], Scratch()
            for index, block in enumerate(view.blocks.arriving):
                whole = block.new_empty(block.shape[1], dtype=at_least_float32(block.dtype))
                for columns, chunk in view.blocks.chunks(index, self._made_of.rows, at_least_float32):
                    whole[columns] = self._at(chunk, scratch)
                values.append(whole)
            self._values = values
        return self._values

    def squared_distances(self, view: RowView) -> tuple[Tensor, Tensor]:
        """Return squared distances and their errors, in the pass that computes the values if that is yet to come."""
        # A rule may have left out rows before it asked for the point, whose distances to the point matter all the same.
        same_rows = torch.equal(view.rows, self._made_of.rows)
        if self._values is not None or not view.blocks.are_quick or not same_rows:
            return super().squared_distances(view)
        values, norms, scratch, differences = [], [], Scratch(), Scratch()
        for index, block in enumerate(view.blocks.arriving):
            whole = block.new_empty(block.shape[1])
            for columns, chunk in view.blocks.chunks(index, view.rows, at_least_float32):
                value = whole[columns]
                value.copy_(self._at(chunk, scratch))
                own = view.mixed(chunk, scratch)
                difference = torch.sub(own, value, out=differences.like(own))
                # Float32 within a chunk, float64 over the chunks.
                norms.append(torch.linalg.vector_norm(difference, dim=1))
            values.append(whole)
        self._values = values
        squared = torch.stack(norms).double().square()
        sums = view.blocks.complete(torch.stack([squared.sum(0), squared.square().sum(0)]))
        return sums[0], _ROUNDING_OF_NORMS * sums[1].sqrt()

    def _at(self, chunk: Tensor, scratch: Scratch) -> Tensor:
        rows = self._made_of.writable(chunk, scratch) if self._overwrites else self._made_of.mixed(chunk, scratch)
        return self._function(rows)


#: What a rule may return: weights of rows, a function of rows, or one [c_b] tensor for each column block.
Point = LazyPoint | list[Tensor]


def as_lazy(point: Point) -> LazyPoint:
    """Return a point that knows its distances."""
    return Given(point) if isinstance(point, list) else point
