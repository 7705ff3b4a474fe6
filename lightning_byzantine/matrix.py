"""The matrix of all workers' vectors, cut into column blocks: the one place that knows how it is stored."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from lightning_byzantine.gram import centred_gram, squared_distances

__all__ = ["Combination", "Point", "WorkerMatrix"]

# Bytes of one chunk: small enough that a CPU's cache holds it through all that is done to it but large enough to be
# shared among its cores, and on an accelerator so large that launching kernels costs nothing beside running them.
_CPU_CHUNK = 2**22
_ACCELERATOR_CHUNK = 2**27

# Largest squared norm of float64 rows: sums of squared distances over the workers must not overflow either.
_LARGEST_SQUARED_NORM = 1e300


@dataclass(frozen=True)
class Combination:
    """A point sum_i w_i x_i, not yet computed.

    Args:
        weights: [n] float64 on the CPU, one for each stored row; their sum is 1.

    """

    weights: Tensor


#: A vector in R^d: either weights of rows, or one [c_b] tensor for each column block.
Point = Combination | list[Tensor]


class WorkerMatrix:
    """m rows (workers) x d columns (coordinates), stored as column blocks [m, c_b] of any floating dtypes.

    Rows can be dropped (:meth:`select`) and replaced by affine combinations of themselves (:meth:`mix`) at no cost:
    both give a lazy view. All statistics are float64 tensors on the CPU, so that a rule's small mathematics needs one
    copy off the device for each pass over the columns. Nothing is ever written to the blocks.

    Args:
        blocks: column blocks, each [m, c_b], on one device.
        complete: sums a statistic over all ranks, where each holds other columns of the same rows.
        shard: which of those columns these are; 0 where a rank holds them all.

    Example:
        >>> matrix = WorkerMatrix([torch.tensor([[0.0], [3.0]]), torch.tensor([[0.0], [4.0]])])
        >>> matrix.squared_distances()
        tensor([[ 0., 25.],
                [25.,  0.]], dtype=torch.float64)
        >>> matrix.materialize(matrix.combine(torch.tensor([0.5, 0.5])))
        [tensor([1.5000]), tensor([2.])]

    """

    def __init__(
        self, blocks: Sequence[Tensor], complete: Callable[[Tensor], Tensor] = lambda total: total, shard: int = 0
    ) -> None:
        self.blocks = list(blocks)
        self.shard = shard
        self._complete = complete
        self._rows = torch.arange(self.blocks[0].shape[0])
        self._mixing: Tensor | None = None
        self._source = self

    @property
    def num_workers(self) -> int:
        """Number of rows, m."""
        return len(self._rows) if self._mixing is None else self._mixing.shape[0]

    def select(self, rows: Tensor) -> "WorkerMatrix":
        """Keep the given rows only; the others are never read again (0 * inf would be nan).

        Args:
            rows: indices into this matrix.

        """
        if self._mixing is not None:
            return self.mix(torch.eye(self.num_workers, dtype=torch.float64)[rows])
        selected = WorkerMatrix(self.blocks, self._complete, self.shard)
        selected._rows = self._rows[rows]
        return selected

    def mix(self, weights: Tensor) -> "WorkerMatrix":
        """Replace the rows by affine combinations of them.

        Args:
            weights: [k, m], each row with sum 1. Row i of the result is sum_j weights[i, j] x_j.

        """
        mixed = WorkerMatrix(self.blocks, self._complete, self.shard)
        mixed._rows = self._rows
        mixed._mixing = weights.double() @ self._mixing_matrix
        mixed._source = self._source
        return mixed

    def map_blocks(self, function: Callable[[Tensor], Tensor]) -> "WorkerMatrix":
        """Return a matrix of new blocks, each ``function`` of an old one: how simulated attacks rewrite rows."""
        return WorkerMatrix([function(block) for block in self.blocks], self._complete, self.shard)

    def combine(self, weights: Tensor) -> Combination:
        """Return the point sum_i w_i x_i, lazily.

        Args:
            weights: [m] with sum 1.

        """
        return Combination(weights.double() @ self._mixing_matrix)

    def mean(self) -> Combination:
        """Return the average of all rows, lazily."""
        return self.combine(torch.full((self.num_workers,), 1 / self.num_workers, dtype=torch.float64))

    def coordinatewise(self, function: Callable[[Tensor], Tensor]) -> list[Tensor]:
        """Apply a function of m values to every coordinate, in one pass.

        Args:
            function: maps a chunk [m, c] (float32, or float64 for float64 blocks) to [c]; must not write to it.

        Returns:
            One [c_b] tensor a block.

        """
        return [
            torch.cat([function(self._mixed(chunk)) for _, chunk in self._chunks(index, _at_least_float32)])
            for index in range(len(self.blocks))
        ]

    def squared_norms(self) -> Tensor:
        """Return ||x_i||^2, [m], in one pass; non-finite where the row or the float64 sum is."""
        return self._sum_over_columns(lambda chunk, _: chunk.square().sum(1))

    def squared_distances(self) -> Tensor:
        """Return ||x_i - x_j||^2, [m, m]: through the Gram matrix, one pass for all rules and views together."""
        gram = self._mixing_matrix @ self._source._centred_gram @ self._mixing_matrix.T
        return squared_distances(gram)

    def distances(self, center: Point) -> Tensor:
        """Return ||x_i - center||, [m]: no pass over the columns when ``center`` is a :class:`Combination`."""
        if isinstance(center, Combination):
            offset = self._mixing_matrix - center.weights
            return ((offset @ self._source._centred_gram) * offset).sum(1).clamp(min=0).sqrt()
        return self._sum_over_columns(lambda chunk, at: (chunk - at(center).double()).square().sum(1)).sqrt()

    def length(self, direction: Tensor) -> Tensor:
        """Return ||sum_i u_i x_i|| for weights u, [m], whose sum is 0: the length of a step between combinations."""
        offset = direction @ self._mixing_matrix
        return (offset @ self._source._centred_gram @ offset).clamp(min=0).sqrt()

    def materialize(self, point: Point) -> list[Tensor]:
        """Compute a point: one [c_b] tensor a block, in the block's dtype. One pass for a :class:`Combination`."""
        if not isinstance(point, Combination):
            return [part.to(block.dtype) for part, block in zip(point, self.blocks, strict=True)]
        return [
            torch.cat([_weighted_sum(chunk, point.weights) for _, chunk in self._chunks(index, _at_least_float32)]).to(
                block.dtype
            )
            for index, block in enumerate(self.blocks)
        ]

    def measurable(self) -> Tensor:
        """Return a mask [m]: rows that are finite and whose squared norm does not overflow the columns' dtype.

        The limit is float32's for half-precision columns, whose sums are never kept in half precision, and 1e300 for
        float64 columns, which leaves room for sums over the workers.
        """
        widest = max((_at_least_float32(block.dtype) for block in self.blocks), key=lambda dtype: dtype.itemsize)
        norms = self.squared_norms()
        return norms.isfinite() & (norms <= min(torch.finfo(widest).max, _LARGEST_SQUARED_NORM))

    @property
    def _mixing_matrix(self) -> Tensor:
        return torch.eye(len(self._rows), dtype=torch.float64) if self._mixing is None else self._mixing

    @cached_property
    def _centred_gram(self) -> Tensor:
        return centred_gram(self._gram)

    def _gram(self, origin: int | None) -> Tensor:
        total = torch.zeros(len(self._rows), len(self._rows), dtype=torch.float64, device=self.blocks[0].device)
        for index in range(len(self.blocks)):
            for _, chunk in self._chunks(index, _float64):
                rows = chunk if origin is None else chunk - chunk[origin]
                total.addmm_(rows, rows.T)
        return self._complete(total).cpu()

    def _sum_over_columns(self, statistic: Callable[[Tensor, Callable[[list[Tensor]], Tensor]], Tensor]) -> Tensor:
        """Sum a float64 [m] statistic of mixed chunks; ``at(vector)`` is the vector's part that a chunk covers."""
        total = torch.zeros(self.num_workers, dtype=torch.float64, device=self.blocks[0].device)
        for index in range(len(self.blocks)):
            for columns, chunk in self._chunks(index, _float64):

                def at(vector: list[Tensor], index: int = index, columns: slice = columns) -> Tensor:
                    return vector[index][columns]

                total += statistic(self._mixed(chunk), at)
        return self._complete(total).cpu()

    def _mixed(self, chunk: Tensor) -> Tensor:
        return chunk if self._mixing is None else torch.stack([_weighted_sum(chunk, row) for row in self._mixing])

    def _chunks(self, index: int, dtype: Callable[[torch.dtype], torch.dtype]) -> Iterator[tuple[slice, Tensor]]:
        """Yield (columns, stored rows of those columns) of one block, cut to fit the cache."""
        block = self.blocks[index]
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


def _weighted_sum(rows: Tensor, weights: Tensor) -> Tensor:
    """Return sum_i w_i x_i of the rows whose weight is not 0, of which there is at least one."""
    # Row by row and without fused operations, not as a product of matrices: each coordinate then comes out the same
    # to the bit wherever DDP's buckets or the chunks are cut, which a resumed run needs, and as stock DDP has it; and
    # neither autocast nor TensorFloat-32, which round to three digits, have a say in it.
    first, *others = [(rows[index], weight) for index, weight in enumerate(weights.tolist()) if weight != 0]
    total: Tensor = first[0] * first[1]
    for row, weight in others:
        total += row * weight
    return total
