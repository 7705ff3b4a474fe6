"""Vectors that are computed lazily, such as the results of rules."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from lightning_byzantine.matrix.blocks import at_least_float32, float64
from lightning_byzantine.matrix.column_function import ColumnFunction
from lightning_byzantine.matrix.row_view import RowView, weighted_sum
from lightning_byzantine.matrix.scratch import Scratch

__all__ = ["Combination", "Coordinatewise", "Given", "LazyPoint", "Measurement", "Point", "as_lazy"]

# Relative error of a squared distance that is summed in float32 over one chunk: a multiple of float32's rounding.
_ROUNDING = 2.0**-24
_ROUNDING_OF_NORMS = 16 * _ROUNDING


class LazyPoint(ABC):
    """A vector in R^d that is computed on request, and its distances from rows."""

    @abstractmethod
    def values(self, view: RowView) -> list[Tensor]:
        """Return one [c_b] tensor for each block, in float32 or float64.

        Args:
            view: any view of the rows from which the point was computed.

        """

    def exact_values(self, view: RowView) -> list[Tensor]:
        """Return the same as accurate as if no value had been rounded to less than float64."""
        return self.values(view)

    def exact_squared_distances(self, view: RowView) -> Tensor:
        """Return ||x_i - point||^2 of the rows of a view, [m] float64, accurate to float64: in a pass more."""
        values = self.exact_values(view)

        def statistic(chunk: Tensor, at: Callable[[list[Tensor]], Tensor]) -> Tensor:
            return (chunk - at(values).double()).square().sum(1)

        return view.sum_over_columns(statistic)

    def squared_distances(self, view: RowView) -> tuple[Tensor, Tensor]:
        """Return the same as quickly as possible, with bounds of the rounding errors: two [m]."""
        squared = self.exact_squared_distances(view)
        return squared, torch.zeros_like(squared)

    def known_products(self, view: RowView) -> Tensor | None:
        """Return <x_i - point, x_j - point>, [m, m], if neither a pass nor a collective is needed; None otherwise."""
        return None


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
        return view.compute(lambda chunk, out: weighted_sum(chunk, self.weights, out), row_by_row=True)

    def exact_values(self, view: RowView) -> list[Tensor]:
        """Return the weighted sum of the rows in float64, in one pass."""
        return view.compute(
            lambda chunk, out: weighted_sum(chunk, self.weights, out), float64, float64, row_by_row=True
        )

    def squared_distances(self, view: RowView) -> tuple[Tensor, Tensor]:
        """Return squared distances and their errors, from inner products."""
        gram = view.products.serving(self.is_affine).gram
        return gram.mixed(view.weights - self.weights).squared_norms()

    def exact_squared_distances(self, view: RowView) -> Tensor:
        """Return squared distances, from inner products accurate to float64."""
        gram = view.products.serving(self.is_affine).exact_gram
        return gram.mixed(view.weights - self.weights).squared_norms()[0]

    def known_products(self, view: RowView) -> Tensor | None:
        """Return inner products about the point, if those of the rows are known."""
        gram = view.products.serving(self.is_affine).known_gram
        return None if gram is None else gram.mixed_products(view.weights - self.weights)


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

    Distances are from the point before it is rounded, or rounding would break ties: see :class:`ColumnFunction`.

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
        self._keeps_ties = isinstance(function, ColumnFunction)
        self._needs_digits = made_of.mixing is not None and isinstance(function, ColumnFunction) and function.jumps

    def values(self, view: RowView) -> list[Tensor]:
        """Return the function's values, computed once, in one pass."""
        if self._values is None:
            scratch = Scratch()
            self._values = self._made_of.compute(
                lambda chunk, out: out.copy_(self._at(chunk, scratch)),
                chunks_in=float64 if self._needs_digits else at_least_float32,
            )
        return self._values

    def exact_values(self, view: RowView) -> list[Tensor]:
        """Return the function's values before they are rounded, in one pass."""
        made_of, scratch = self._made_of, Scratch()
        function = self._function.eager if isinstance(self._function, ColumnFunction) else self._function
        # Means of rows are rounded in float32, and functions of another kind may round as well.
        is_exact = self._keeps_ties and made_of.mixing is None
        return made_of.compute(
            lambda chunk, out: out.copy_(function(made_of.writable(chunk, scratch))),
            chunks_in=at_least_float32 if is_exact else float64,
            result_in=float64,
        )

    def squared_distances(self, view: RowView) -> tuple[Tensor, Tensor]:
        """Return squared distances and their errors, in the pass that computes the values unless they are known."""
        # The point may have been computed without some rows whose distances from it are still needed.
        same_rows = torch.equal(view.rows, self._made_of.rows)
        if self._values is not None or self._needs_digits or not view.blocks.are_quick or not same_rows:
            return super().squared_distances(view)
        shares = self._made_of.largest_shares() + view.largest_shares()
        is_mixed = bool(shares.any())
        measured, scratch, differences = [], Scratch(), Scratch()

        def measure(chunk: Tensor, out: Tensor) -> None:
            center = self._at(chunk, scratch)
            out.copy_(center)
            difference = torch.sub(view.mixed(chunk, scratch), out, out=differences.rows(view.num_rows, chunk))
            if center.dtype != out.dtype:
                difference -= (center - out).to(out.dtype)
            # Float32 within a chunk, float64 over the chunks.
            measured.append(torch.linalg.vector_norm(difference, dim=1))
            lengths.append(torch.linalg.vector_norm(chunk, dim=1) if is_mixed else chunk.new_zeros(len(chunk)))

        lengths: list[Tensor] = []
        self._values = view.compute(measure)
        squared = torch.stack(measured).double().square()
        squared_lengths = torch.stack(lengths).double().square().sum(0)
        sums = view.blocks.complete(torch.cat([squared.sum(0), squared.square().sum(0), squared_lengths])).cpu()
        squared, squares, squared_lengths = torch.split(sums, [view.num_rows, view.num_rows, len(shares)])
        # The point and the rows may be off by what products of float32 round: n terms of the same size, of which the
        # partial sums are half of the whole on average.
        off = (2 + len(shares) / 2) * _ROUNDING * (shares @ squared_lengths.sqrt())
        return squared, _ROUNDING_OF_NORMS * squares.sqrt() + off * (2 * squared.sqrt() + off)

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
