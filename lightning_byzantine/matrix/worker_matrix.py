"""The matrix of all workers' vectors, stored in column blocks, which rules and attacks work on."""

from collections.abc import Callable, Sequence
from copy import copy

import torch
from torch import Tensor

from lightning_byzantine.matrix.arriving import Arriving
from lightning_byzantine.matrix.blocks import Blocks, at_least_float32
from lightning_byzantine.matrix.compiled import Compiled
from lightning_byzantine.matrix.points import Combination, Coordinatewise, Measurement, Point, as_lazy
from lightning_byzantine.matrix.row_distances import RowDistances
from lightning_byzantine.matrix.row_view import RowView
from lightning_byzantine.matrix.segmented import Segmented
from lightning_byzantine.matrix.segments import Names, Segments

__all__ = ["WorkerMatrix"]

# Largest squared norm of float64 rows, so that sums of squared distances over the workers don't overflow either.
_LARGEST_SQUARED_NORM = 1e300


class WorkerMatrix(RowDistances):
    """m rows (workers) x d columns (coordinates), stored as column blocks [m, c_b] of any floating-point dtypes.

    Rows can be dropped (:meth:`select`), replaced by affine combinations (:meth:`mix`) and scaled (:meth:`scale`) at no
    cost: all return a lazy view. All statistics are float64 tensors on the CPU, so that each pass over the columns
    copies from the device once. The blocks are never written to.

    Args:
        blocks: column blocks, each [m, c_b], on one device. Passes over the columns wait for each when they reach it.
        complete: sums a statistic over all ranks, if these hold different columns of the same rows.
        shard: index of this rank's columns; 0 if each rank holds all of them.
        layout: for each block, the names of the parameters whose flattened values are its columns (before the matrix
            was divided into shards); None for a plain tensor. DDP changes it once, after a process's first step.
        segments: which columns belong to which parameter; None for a single segment.
        most_columns: upper bound of the number of columns on all ranks together, the same on every rank; None for one
            that holds if each has the same number, or all, and ranks are not more than rows.

    Attributes:
        previous: the aggregate of the previous step, one [c_b] tensor for each block; None in the first step, and if
            the rule does not use it.

    Example:
        >>> matrix = WorkerMatrix([torch.tensor([[0.0], [3.0]]), torch.tensor([[0.0], [4.0]])])
        >>> matrix.squared_distances()
        tensor([[ 0., 25.],
                [25.,  0.]], dtype=torch.float64)
        >>> matrix.materialize(matrix.combine(torch.tensor([0.5, 0.5])))
        [tensor([1.5000]), tensor([2.])]

    """

    def __init__(
        self,
        blocks: Sequence[Tensor] | Arriving,
        complete: Callable[[Tensor], Tensor] = lambda total: total,
        shard: int = 0,
        layout: tuple[Names, ...] | None = None,
        segments: Segments | None = None,
        most_columns: int | None = None,
    ) -> None:
        self.shard = shard
        self.layout = layout
        self.previous: list[Tensor] | None = None
        super().__init__(RowView.of_all(Blocks(blocks, complete, segments, most_columns=most_columns)))

    @property
    def blocks(self) -> list[Tensor]:
        """All blocks, after waiting for them; only the rows of :attr:`workers` may be read."""
        return list(self._view.blocks.arriving)

    @property
    def num_workers(self) -> int:
        """Number of rows, m."""
        return self._view.num_rows

    @property
    def num_offered(self) -> int:
        """Number of all workers, including those whose rows were dropped."""
        return self._view.blocks.num_rows

    @property
    def workers(self) -> Tensor:
        """Indices of the workers whose rows this matrix contains or mixes, without dropped ones."""
        return self._view.rows

    @property
    def segments(self) -> Segments | None:
        """Which columns belong to which parameter; None for a single segment."""
        return self._view.blocks.segments

    def select(self, rows: Tensor) -> "WorkerMatrix":
        """Keep the given rows only; the others are never read again (0 * inf would be nan).

        Args:
            rows: indices into this matrix.

        """
        return self._seen_by(self._view.select(rows))

    def mix(self, weights: Tensor) -> "WorkerMatrix":
        """Replace the rows by affine combinations of them.

        Args:
            weights: [k, m], each row with sum 1. Row i of the result is sum_j weights[i, j] x_j.

        """
        return self._seen_by(self._view.mix(weights))

    def scale(self, factors: Tensor) -> "WorkerMatrix":
        """Multiply each row by its factor.

        Args:
            factors: [m].

        """
        return self._seen_by(self._view.scale(factors))

    def map_blocks(self, function: Callable[[Tensor], Tensor]) -> "WorkerMatrix":
        """Return a matrix of ``function(block)`` for each block; simulated attacks use this to rewrite rows."""
        return self.with_blocks([function(block) for block in self._view.blocks.arriving])

    def with_blocks(self, blocks: Sequence[Tensor]) -> "WorkerMatrix":
        """Return a matrix of other values in the same columns."""
        return self._seen_by(RowView.of_all(self._view.blocks.like(blocks)))

    def with_segments(self, segments: Segments) -> "WorkerMatrix":
        """Return the same rows with other :attr:`segments`."""
        return self._seen_by(self._view.of(self._view.blocks.like(segments=segments)))

    def split(self, with_products: bool = True) -> "dict[str, WorkerMatrix]":
        """Return the columns of each segment as a matrix, by its name; small segments belong to the one before.

        Segments in which no parameter takes part in this step are left out.

        Args:
            with_products: whether to compute the inner products of all of them together: in one pass and one sum over
                ranks, or in two or three where digits were lost.

        """
        groups = self._view.blocks.groups
        if not groups:
            return {"": self}
        names = [group.name for group in groups]
        parts = dict(zip(names, map(self._seen_by, self._view.split(with_products)), strict=True))
        if self.previous is not None:
            for group, part in zip(groups, parts.values(), strict=True):
                part.previous = group.of(self.previous)
        return parts

    def join(self, points: Sequence[Point]) -> Point:
        """Return the point whose columns of each segment are those of a point of :meth:`split`, in its order."""
        lazy = [as_lazy(point) for point in points]
        return Segmented(self._view, lazy) if self._view.blocks.groups else lazy[0]

    def with_previous(self, previous: list[Tensor] | None) -> "WorkerMatrix":
        """Return the same rows with :attr:`previous` set."""
        matrix = copy(self)
        matrix.previous = previous
        return matrix

    def sketches(self, values: Sequence[Tensor], since: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
        """Return what tells how far rows have moved along the step from a point s to another point a, in one pass.

        Args:
            values: a, one [c_b] tensor for each block.
            since: s, likewise.

        Returns:
            Two float64 tensors on the device of the rows: sketches of the rows, of s and of a - s, [m + 2, k], see
            :func:`~lightning_byzantine.matrix.sketch.fold`, the same however columns are cut into blocks and
            shards; and the lengths ||s|| and ||a - s||, [2]. The rows must be unmixed.

        """
        return self._view.sketches(values, since)

    def combine(self, weights: Tensor) -> Combination:
        """Return the point sum_i w_i x_i, lazily.

        Args:
            weights: [m] with sum 1.

        """
        return Combination(weights.double() @ self._view.weights, is_affine=not self._view.products.know_zero)

    def mean(self) -> Combination:
        """Return the average of all rows, lazily."""
        return self.combine(torch.full((self.num_workers,), 1 / self.num_workers, dtype=torch.float64))

    def coordinatewise(self, function: Callable[[Tensor], Tensor], overwrites: bool = True) -> Coordinatewise:
        """Return the point of which each coordinate is a function of m values, lazily, in one pass when computed.

        Args:
            function: maps m rows [m, c] (float32, or float64 for float64 blocks) to [c]; a
                :class:`~lightning_byzantine.matrix.column_function.ColumnFunction` if distances from the point are to
                tie where they would without rounding.
            overwrites: whether it may write to these rows, which are then a copy.

        """
        return Coordinatewise(self._view, function, overwrites)

    def materialize(self, point: Point) -> list[Tensor]:
        """Compute a point: one [c_b] tensor per block, in the block's dtype. One pass for a :class:`Combination`."""
        values = as_lazy(point).values(self._view)
        return [part.to(block.dtype) for part, block in zip(values, self._view.blocks.memory, strict=True)]

    def measure(self, from_products: bool = False, split: bool = False) -> Measurement:
        """Return which rows are finite and have a squared norm that does not overflow the columns' dtype.

        The limit is float32's for half-precision columns, whose sums are never kept in half precision, and 1e300 for
        float64 columns, so that sums over the workers don't overflow either.

        Args:
            from_products: whether to use the inner products, if these are needed anyway, instead of another pass.
            split: whether those of each segment are needed.

        """
        view = self._view
        if split:
            view.products.compute_parts(sharply=False)
        has_products = from_products and view.mixing is None
        norms = view.products.squared_norms() if has_products else view.quick_squared_norms()
        return self._measurement(norms)

    def measure_and_compute(self, function: Compiled) -> Measurement:
        """Do the same as :meth:`measure` in the pass that computes a point, unless rows are missing or too large.

        Args:
            function: of every column.

        """
        if not self._view.is_everything:
            return self.measure()
        blocks = self._view.blocks
        values, squares = zip(*map(function.with_squares, blocks.arriving), strict=True)
        pairs = zip(values, blocks.memory, strict=True)
        rounded = [part.to(at_least_float32(block.dtype)) for part, block in pairs]
        point = Coordinatewise(self._view, function, values=rounded)
        if float(blocks.complete(torch.stack(squares).sum())) <= self._largest_squared_norm:
            unknown = torch.full((self.num_workers,), torch.nan, dtype=torch.float64)
            return Measurement(torch.ones(self.num_workers, dtype=torch.bool), unknown, point)
        return self._measurement(self._view.quick_squared_norms(), point)

    def _seen_by(self, view: RowView) -> "WorkerMatrix":
        matrix = copy(self)
        matrix._view, matrix._distances_from_center = view, None
        return matrix

    def _measurement(self, squared_norms: Tensor, point: Coordinatewise | None = None) -> Measurement:
        is_measurable = squared_norms.isfinite() & (squared_norms <= self._largest_squared_norm)
        return Measurement(is_measurable, squared_norms.sqrt(), point)

    @property
    def _largest_squared_norm(self) -> float:
        dtypes = [at_least_float32(block.dtype) for block in self._view.blocks.memory]
        return min(max(torch.finfo(dtype).max for dtype in dtypes), _LARGEST_SQUARED_NORM)
