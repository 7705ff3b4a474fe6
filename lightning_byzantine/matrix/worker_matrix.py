"""The matrix of all workers' vectors, cut into column blocks: the one place that knows how it is stored."""

import math
from collections.abc import Callable, Iterator, Sequence
from functools import cached_property

import torch
from torch import Tensor, nn

from lightning_byzantine.aggregation.mantissas import count_bits, unlikely_bits
from lightning_byzantine.matrix.anchored_gram import AnchoredGram
from lightning_byzantine.matrix.arriving import Arriving
from lightning_byzantine.matrix.compiled import Compiled
from lightning_byzantine.matrix.gram import Gram, all_digits, are_sharp, centred_gram, quick_gram, quick_products
from lightning_byzantine.matrix.points import Combination, Coordinatewise, Point
from lightning_byzantine.matrix.scratch import Scratch
from lightning_byzantine.matrix.ties import nearest, told_apart

__all__ = ["Names", "WorkerMatrix"]

# The parameters that make up a block, in order; None for one that is switched off, as `toggle_optimizer` does.
Names = tuple[str | None, ...]

# Bytes of one chunk: small enough that a CPU's cache holds it through all that is done to it but large enough to be
# shared among its cores, and on an accelerator so large that launching kernels costs nothing beside running them.
_CPU_CHUNK = 2**22
_ACCELERATOR_CHUNK = 2**27

# Largest squared norm of float64 rows: sums of squared distances over the workers must not overflow either.
_LARGEST_SQUARED_NORM = 1e300

# Columns that fill vector registers of any size.
_REGISTERS = 64

# Of a squared distance that is added up in float32 over one chunk: some times the rounding of float32.
_ROUNDING_OF_NORMS = 16 * 2.0**-24


class WorkerMatrix:
    """m rows (workers) x d columns (coordinates), stored as column blocks [m, c_b] of any floating dtypes.

    Rows can be dropped (:meth:`select`), replaced by affine combinations of themselves (:meth:`mix`) and made shorter
    (:meth:`scale`) at no cost: all give a lazy view. All statistics are float64 tensors on the CPU, so that a rule's
    small mathematics needs one copy off the device for each pass over the columns. Nothing is ever written to the
    blocks.

    Args:
        blocks: column blocks, each [m, c_b], on one device. Passes over the columns wait for each when they come to it.
        complete: sums a statistic over all ranks, where each holds other columns of the same rows.
        shard: which of those columns these are; 0 where a rank holds them all.
        layout: for each block, the names of the parameters whose flattened values its columns are, or were before the
            matrix was cut into shards; None for a plain tensor. DDP changes it once, after a process's first step.

    Attributes:
        previous: what was aggregated in the step before, one [c_b] tensor for each block; None in the first step, and
            where the rule has no use for it.

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
    ) -> None:
        self._blocks = blocks if isinstance(blocks, Arriving) else Arriving(blocks)
        self.shard = shard
        self.layout = layout
        self.previous: list[Tensor] | None = None
        self._complete = complete
        self._rows = torch.arange(self._blocks.memory[0].shape[0])
        self._computed_ahead: dict[Callable[[Tensor], Tensor], list[Tensor]] = {}
        self._mixing: Tensor | None = None
        # None for itself, since memory in a cycle would wait for the garbage collector.
        self._mixed_from: WorkerMatrix | None = None  # the same rows, not mixed
        self._selected_from: WorkerMatrix | None = None  # all rows of the blocks
        self._is_anchored = False  # whether inner products tell where 0 is
        # What has been measured, for those who ask later: squared norms, and distances from a center.
        self._measured_norms: Tensor | None = None
        self._measured_distances: Tensor | None = None
        self._watched: Arriving | None = None  # whose bits are to be counted
        self._bit_counts: Tensor | None = None

    @property
    def blocks(self) -> list[Tensor]:
        """The blocks, all of them arrived; other rows than :attr:`workers` must not be read."""
        return list(self._blocks)

    @property
    def num_workers(self) -> int:
        """Number of rows, m."""
        return len(self._rows) if self._mixing is None else self._mixing.shape[0]

    @property
    def workers(self) -> Tensor:
        """Indices of the workers whose rows this matrix, or the one it mixes, was made of: some may be dropped."""
        return self._rows

    def select(self, rows: Tensor) -> "WorkerMatrix":
        """Keep the given rows only; the others are never read again (0 * inf would be nan).

        Args:
            rows: indices into this matrix.

        """
        if self._mixing is not None:
            return self.mix(torch.eye(self.num_workers, dtype=torch.float64)[rows])
        selected = self.with_blocks(self._blocks)
        selected._rows = self._rows[rows]
        selected._selected_from = self._stored
        return selected

    def mix(self, weights: Tensor) -> "WorkerMatrix":
        """Replace the rows by affine combinations of them.

        Args:
            weights: [k, m], each row with sum 1. Row i of the result is sum_j weights[i, j] x_j.

        """
        mixed = self.with_blocks(self._blocks)
        mixed._rows = self._rows
        mixed._mixing = weights.double() @ self._mixing_matrix
        mixed._mixed_from = self._source
        return mixed

    def scale(self, factors: Tensor) -> "WorkerMatrix":
        """Multiply every row by a number of its own: lengths are about 0, which the inner products then have to know.

        Args:
            factors: [m].

        """
        scaled = self.mix(factors.double().diag())
        scaled._mixed_from = self._source._with_anchor
        return scaled

    def map_blocks(self, function: Callable[[Tensor], Tensor]) -> "WorkerMatrix":
        """Return a matrix of new blocks, each ``function`` of an old one: how simulated attacks rewrite rows."""
        return self.with_blocks([function(block) for block in self._blocks])

    def with_blocks(self, blocks: Sequence[Tensor] | Arriving) -> "WorkerMatrix":
        """Return a matrix of other values in the same columns."""
        matrix = WorkerMatrix(blocks, self._complete, self.shard, self.layout)
        matrix.previous = self.previous
        return matrix

    def combine(self, weights: Tensor) -> Combination:
        """Return the point sum_i w_i x_i, lazily.

        Args:
            weights: [m] with sum 1.

        """
        return Combination(weights.double() @ self._mixing_matrix, is_affine=not self._source._is_anchored)

    def mean(self) -> Combination:
        """Return the average of all rows, lazily."""
        return self.combine(torch.full((self.num_workers,), 1 / self.num_workers, dtype=torch.float64))

    def coordinatewise(self, function: Callable[[Tensor], Tensor]) -> Coordinatewise:
        """Return the point whose every coordinate is a function of m values, lazily; one pass when it is computed.

        Args:
            function: maps m rows [m, c] (float32, or float64 for float64 blocks), which it may overwrite, to [c].

        """
        point = Coordinatewise(self, function)
        # Handed over, not kept: a point is asked for once.
        point.values = self._computed_ahead.pop(function, None)
        return point

    def squared_norms(self) -> Tensor:
        """Return ||x_i||^2, [m], in one pass; non-finite where the row or the float64 sum is."""
        return self._sum_over_columns(lambda chunk, _: chunk.square().sum(1))

    def squared_distances(self) -> Tensor:
        """Return ||x_i - x_j||^2, [m, m]: through the Gram matrix, one pass for all rules and views together."""
        return self._gram.squared_distances()[0]

    def exact_squared_distances(self) -> Tensor:
        """Return ||x_i - x_j||^2, [m, m], in float64: for what is not lowest where distances are."""
        return self._exact_gram(self._source).squared_distances()[0]

    def lowest(self, statistic: Callable[[Tensor], Tensor], count: int) -> Tensor:
        """Return where a statistic of the squared distances is lowest, ties broken by index.

        Args:
            statistic: maps [m, m] to [k, n], or [n]; must grow with each of the distances.
            count: how many to find, at most n.

        Returns:
            [k, count], or [count]: indices in [0, n), lowest first.

        """
        squared, errors = self._gram.squared_distances()
        if errors.any() and not told_apart(statistic(squared - errors), statistic(squared + errors), count):
            squared = self.exact_squared_distances()
        return nearest(statistic(squared), count)

    def nearest(self, center: Point, count: int) -> Tensor:
        """Return the indices of the ``count`` rows nearest to a point, ties broken by index: [count], nearest first."""
        squared, errors = self._measured_from(center)
        if errors.any() and not told_apart(squared - errors, squared + errors, count):
            return nearest(self._exact_distances(center), count)
        return nearest(squared.sqrt(), count)

    def distances(self, center: Point) -> Tensor:
        """Return ||x_i - center||, [m]: no pass over the columns when ``center`` is a :class:`Combination`."""
        squared, errors = self._measured_from(center)
        return squared.sqrt() if are_sharp(squared, errors) else self._exact_distances(center)

    def length(self, direction: Tensor) -> Tensor:
        """Return ||sum_i u_i x_i|| for weights u, [m], whose sum is 0: the length of a step between combinations."""
        return self._source._inner.mixed(direction[None] @ self._mixing_matrix).squared_norms()[0].sqrt().squeeze(0)

    def materialize(self, point: Point) -> list[Tensor]:
        """Compute a point: one [c_b] tensor a block, in the block's dtype. One pass for a :class:`Combination`."""
        if isinstance(point, Coordinatewise):
            point = self._values(point)
        if not isinstance(point, Combination):
            return [part.to(block.dtype) for part, block in zip(point, self._blocks.memory, strict=True)]
        sums = []
        for index, block in enumerate(self._blocks):
            total = block.new_empty(block.shape[1], dtype=_at_least_float32(block.dtype))
            for columns, chunk in self._chunks(index, _at_least_float32):
                _weighted_sum(chunk, point.weights, out=total[columns])
            sums.append(total.to(block.dtype))
        return sums

    def measurable(self, from_products: bool = False, ahead: Coordinatewise | None = None) -> Tensor:
        """Return a mask [m]: rows that are finite and whose squared norm does not overflow the columns' dtype.

        The limit is float32's for half-precision columns, whose sums are never kept in half precision, and 1e300 for
        float64 columns, which leaves room for sums over the workers.

        Args:
            from_products: look at the inner products, which somebody is going to need: no pass of its own then.
            ahead: what is going to be asked for if all rows are measurable: no pass of its own then, if it is compiled.

        """
        widest = max(
            (_at_least_float32(block.dtype) for block in self._blocks.memory), key=lambda dtype: dtype.itemsize
        )
        largest = min(torch.finfo(widest).max, _LARGEST_SQUARED_NORM)
        if ahead is not None and self._sum_of_squares(ahead) <= largest:
            return torch.ones(self.num_workers, dtype=torch.bool)
        if from_products and self._mixing is None:
            quick = self._stored._quick_gram
            products = self._stored._stored_products if quick is None else quick.products
            norms = products.diagonal()[self._rows]
        else:
            norms = self._quick_squared_norms()
        self._measured_norms = norms
        return norms.isfinite() & (norms <= largest)

    def known_norms(self) -> Tensor:
        """Return ||x_i||, [m], as :meth:`measurable` found them; NaN before that."""
        if self._measured_norms is None:
            return torch.full((self.num_workers,), torch.nan, dtype=torch.float64)
        return self._measured_norms.sqrt()

    def watch_bits(self, source: "WorkerMatrix | None" = None) -> None:
        """Have bits counted along with the first statistic of whole rows, for :meth:`unlikely_bits`.

        Args:
            source: the matrix in which to count them, if not this one, which was made of it.

        """
        self._watched = (source or self)._blocks

    def unlikely_bits(self) -> Tensor | None:
        """Return whose values have bits unlike the others', [m] bool; None if none were counted, or too few."""
        counts = self._stored._bit_counts
        return None if counts is None else unlikely_bits(counts.cpu()[self._rows])

    def known_distances(self, point: Point) -> tuple[Tensor | None, bool]:
        """Return distances that need neither a pass over the columns nor a collective, and what they are from.

        Args:
            point: the rule's result.

        Returns:
            [m] and True for ||x_i - point||, where there are inner products already; [m] and False for distances from
            the center that was measured last; None and False where there is neither.

        """
        if isinstance(point, Combination):
            source = self._source if point.is_affine else vars(self._source).get("_anchored")
            if source is not None and "_inner" in vars(source):
                return source._inner.mixed(self._mixing_matrix - point.weights).squared_norms()[0].sqrt(), True
        return self._measured_distances, False

    @property
    def _source(self) -> "WorkerMatrix":
        return self if self._mixed_from is None else self._mixed_from

    @property
    def _stored(self) -> "WorkerMatrix":
        return self if self._selected_from is None else self._selected_from

    @property
    def _mixing_matrix(self) -> Tensor:
        return torch.eye(len(self._rows), dtype=torch.float64) if self._mixing is None else self._mixing

    @property
    def _gram(self) -> Gram:
        gram = self._source._inner
        return gram if self._mixing is None else gram.points(self._mixing)

    @property
    def _with_anchor(self) -> "WorkerMatrix":
        """The same rows, not mixed, with inner products that tell where 0 is."""
        return self if self._is_anchored else self._anchored

    @cached_property
    def _anchored(self) -> "WorkerMatrix":
        anchored = self.with_blocks(self._blocks)
        anchored._rows = self._rows
        anchored._selected_from = self._stored
        anchored._is_anchored = True
        return anchored

    def _source_for(self, center: Combination) -> "WorkerMatrix":
        return self._source if center.is_affine else self._source._with_anchor

    @cached_property
    def _inner(self) -> Gram:
        """Inner products of the rows, not mixed, about an origin that leaves their distances sharp."""
        quick = self._stored._quick_gram
        if quick is not None:
            selected = quick.rows(self._rows)
            if self._is_anchored:
                selected = AnchoredGram.about_zero(selected)
            if selected.is_sharp():
                return selected
        return self._exact_inner()

    def _exact_inner(self) -> Gram:
        def about(origin: int | None) -> Tensor:
            if origin is None and not self._is_quick and not self._is_anchored:
                return self._stored._stored_products[self._rows][:, self._rows]
            return self._products(origin)

        products = centred_gram(about)
        return (AnchoredGram if self._is_anchored else Gram)(products, torch.zeros_like(products))

    def _exact_gram(self, source: "WorkerMatrix") -> Gram:
        if source._inner.errors.any():
            source._inner = source._exact_inner()
        return self._gram

    @cached_property
    def _stored_products(self) -> Tensor:
        """Inner products of all stored rows about 0, for norms and distances alike: an accelerator is waited for once.

        Rows that are not finite spoil their own products only.
        """
        return self._products(None)

    @cached_property
    def _quick_gram(self) -> Gram | None:
        """Inner products of all stored rows about 0, where float32 arithmetic is quicker; None elsewhere."""
        if not self._is_quick:
            return None
        sums = self._completed(torch.stack([quick_products(block) for block in self._blocks]).sum(0))
        # Every rank holds as many columns of each of the rows, or all of them.
        return quick_gram(sums, num_columns=len(self._rows) * sum(block.shape[1] for block in self._blocks.memory))

    def _products(self, origin: int | None) -> Tensor:
        size = len(self._rows) + self._is_anchored
        total = torch.zeros(size, size, dtype=torch.float64, device=self._blocks.memory[0].device)
        for index in range(len(self._blocks)):
            for _, chunk in self._chunks(index, _float64):
                if self._is_anchored:
                    chunk = nn.functional.pad(chunk, (0, 0, 0, 1))  # 0 as the last row
                rows = chunk if origin is None else chunk - chunk[origin]
                total.addmm_(rows, rows.T)
        return self._completed(total).cpu()

    def _measured_from(self, center: Point) -> tuple[Tensor, Tensor]:
        """Return ||x_i - center||^2, [m], and their errors, quickly if possible."""
        if isinstance(center, Combination):
            return self._source_for(center)._inner.mixed(self._mixing_matrix - center.weights).squared_norms()
        if isinstance(center, Coordinatewise) and center.values is None and self._is_quick:
            squared, errors = self._compute_and_measure(center)
        else:
            squared = self._exact_distances(center).square()
            errors = torch.zeros_like(squared)
        self._measured_distances = squared.sqrt()
        return squared, errors

    def _exact_distances(self, center: Point) -> Tensor:
        if isinstance(center, Combination):
            self._exact_gram(self._source_for(center))
            return self._measured_from(center)[0].sqrt()
        values = self._values(center) if isinstance(center, Coordinatewise) else center

        def statistic(chunk: Tensor, at: Callable[[list[Tensor]], Tensor]) -> Tensor:
            return (chunk - at(values).double()).square().sum(1)

        return self._sum_over_columns(statistic).sqrt()

    def _quick_squared_norms(self) -> Tensor:
        """Return ||x_i||^2, [m], to six digits, where float32 arithmetic is quicker."""
        if not self._is_quick:
            return self.squared_norms()
        scratch = Scratch()
        norms = [
            torch.linalg.vector_norm(chunk if self._mixing is None else self._mixed(chunk, scratch), dim=1)
            for index in range(len(self._blocks))
            for _, chunk in self._chunks(index, _at_least_float32)
        ]
        return self._completed(torch.stack(norms).double().square().sum(0))

    @property
    def _is_quick(self) -> bool:
        memory = self._blocks.memory
        return memory[0].device.type == "cpu" and all(block.dtype == torch.float32 for block in memory)

    def _completed(self, total: Tensor) -> Tensor:
        """Sum a float64 statistic over all ranks, and with the first one how often bits are set: one collective."""
        stored = self._stored
        watched, stored._watched = stored._watched, None
        if watched is None:
            return self._complete(total)
        num_columns = sum(block.shape[1] for block in watched.memory)
        counts = torch.stack([count_bits(block, num_columns) for block in watched]).sum(0)
        sums = self._complete(torch.cat([total.flatten(), counts.flatten()]))
        stored._bit_counts = sums[total.numel() :].view(counts.shape)
        return sums[: total.numel()].view(total.shape)

    def _sum_of_squares(self, point: Coordinatewise) -> float:
        """Compute a compiled point of all stored rows, and return the sum of their squares; nan for other points."""
        if not isinstance(point.function, Compiled) or self is not self._stored:
            return math.nan
        values, squares = zip(*map(point.function.with_squares, self._blocks), strict=True)
        self._computed_ahead[point.function] = list(values)
        return float(self._completed(torch.stack(squares).sum()))

    def _values(self, point: Coordinatewise) -> list[Tensor]:
        if point.values is None:
            matrix = point.matrix
            point.values, scratch = [], Scratch()
            for index, block in enumerate(self._blocks):
                values = block.new_empty(block.shape[1], dtype=_at_least_float32(block.dtype))
                for columns, chunk in matrix._chunks(index, _at_least_float32):
                    values[columns] = matrix._function_of(point, chunk, scratch)
                point.values.append(values)
        return point.values

    def _compute_and_measure(self, point: Coordinatewise) -> tuple[Tensor, Tensor]:
        """Compute the point, and squared distances from it, in the same pass; float32 within a chunk."""
        values, norms, scratch, differences = [], [], Scratch(), Scratch()
        for index, block in enumerate(self._blocks):
            whole = block.new_empty(block.shape[1])
            for columns, chunk in self._chunks(index, _at_least_float32):
                value = whole[columns]
                value.copy_(point.matrix._function_of(point, chunk, scratch))
                own = chunk if self._mixing is None else self._mixed(chunk, scratch)
                difference = torch.sub(own, value, out=differences.like(own))
                norms.append(torch.linalg.vector_norm(difference, dim=1))
            values.append(whole)
        point.values = values
        squared = torch.stack(norms).double().square()
        sums = self._completed(torch.stack([squared.sum(0), squared.square().sum(0)]))
        return sums[0], _ROUNDING_OF_NORMS * sums[1].sqrt()

    def _sum_over_columns(self, statistic: Callable[[Tensor, Callable[[list[Tensor]], Tensor]], Tensor]) -> Tensor:
        """Sum a float64 [m] statistic of mixed chunks; ``at(vector)`` is the vector's part that a chunk covers."""
        total = torch.zeros(self.num_workers, dtype=torch.float64, device=self._blocks.memory[0].device)
        scratch = Scratch()
        for index in range(len(self._blocks)):
            for columns, chunk in self._chunks(index, _float64):

                def at(vector: list[Tensor], index: int = index, columns: slice = columns) -> Tensor:
                    return vector[index][columns]

                rows = chunk if self._mixing is None else self._mixed(chunk, scratch)
                total += statistic(rows, at)
        return self._completed(total).cpu()

    def _function_of(self, point: Coordinatewise, chunk: Tensor, scratch: Scratch) -> Tensor:
        # What is compiled writes nothing, and so needs no copy.
        spared = self._mixing is None and isinstance(point.function, Compiled)
        return point.function(chunk if spared else self._mixed(chunk, scratch))

    def _mixed(self, chunk: Tensor, scratch: Scratch) -> Tensor:
        """Write this view's rows of a chunk of stored rows into ``scratch``, and return them, [m, c]."""
        if self._mixing is None:
            return scratch.like(chunk).copy_(chunk)
        if chunk.device.type != "cpu":
            mixed = scratch.rows(self.num_workers, chunk)
            for row, weights in zip(mixed, self._mixing, strict=True):
                _weighted_sum(chunk, weights, out=row)
            return mixed
        # The last columns of a product are computed in another way if vector registers are not full, and then come
        # out different in the last digit, depending on where the chunk was cut.
        missing = -chunk.shape[1] % _REGISTERS
        padded = nn.functional.pad(chunk, (0, missing)) if missing else chunk
        with all_digits():
            product = torch.mm(self._mixing.to(chunk.dtype), padded, out=scratch.rows(self.num_workers, padded))
        return product[:, : chunk.shape[1]]

    def _chunks(self, index: int, dtype: Callable[[torch.dtype], torch.dtype]) -> Iterator[tuple[slice, Tensor]]:
        """Yield (columns, stored rows of those columns) of one block, cut to fit the cache."""
        block = self._blocks[index]
        every_row = torch.equal(self._rows, torch.arange(block.shape[0]))
        size = _CPU_CHUNK if block.device.type == "cpu" else _ACCELERATOR_CHUNK
        working_dtype = dtype(block.dtype)
        width = max(1, size // (len(self._rows) * working_dtype.itemsize))
        # A block without columns has one empty chunk, so that its result is empty and not missing.
        for start in range(0, max(1, block.shape[1]), width):
            columns = slice(start, start + width)
            chunk = block[:, columns] if every_row else block[:, columns][self._rows.to(block.device)]
            yield columns, chunk.to(working_dtype)


def _at_least_float32(dtype: torch.dtype) -> torch.dtype:
    return torch.promote_types(dtype, torch.float32)


def _float64(_: torch.dtype) -> torch.dtype:
    return torch.float64


def _weighted_sum(rows: Tensor, weights: Tensor, out: Tensor) -> None:
    """Write sum_i w_i x_i of the rows whose weight is not 0."""
    # Row by row and without fused operations, not as a product of matrices: each coordinate then comes out the same
    # to the bit wherever DDP's buckets or the chunks are cut, which a resumed run needs, and as stock DDP has it; and
    # neither autocast nor TensorFloat-32, which round to three digits, have a say in it.
    used = [(rows[index], weight) for index, weight in enumerate(weights.tolist()) if weight != 0]
    if not used:  # a row that was scaled to 0
        out.zero_()
        return
    first, *others = used
    torch.mul(*first, out=out)
    product = torch.empty_like(out)
    for row, weight in others:
        out += torch.mul(row, weight, out=product)
