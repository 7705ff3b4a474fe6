"""Lazy selections and combinations of the stored rows."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import groupby
from operator import itemgetter

import torch
from torch import Tensor, nn

from lightning_byzantine.matrix.blocks import Blocks, at_least_float32, float64
from lightning_byzantine.matrix.gram import Gram
from lightning_byzantine.matrix.products import Products, StoredProducts
from lightning_byzantine.matrix.quick_products import all_digits
from lightning_byzantine.matrix.scratch import Scratch
from lightning_byzantine.matrix.sketch import PERIOD, WIDTH, fold, sketches_of

__all__ = ["RowView", "weighted_sum"]

# Columns that fill vector registers of any size.
_REGISTERS = 64


@dataclass(frozen=True)
class RowView:
    """m rows, each an affine combination of n stored rows, computed lazily.

    Args:
        blocks: the stored rows.
        rows: [n], indices of those that may be read.
        products: their inner products; these include 0 if rows have been scaled, which makes lengths matter.
        mixing: [m, n] float64, the weights of each row; None for the n rows unchanged.

    """

    blocks: Blocks
    rows: Tensor
    products: Products
    mixing: Tensor | None = None

    @classmethod
    def of_all(cls, blocks: Blocks) -> "RowView":
        """Return a view of all stored rows, unchanged."""
        rows = torch.arange(blocks.num_rows)
        return cls(blocks, rows, Products(StoredProducts(blocks), rows))

    def of(self, blocks: Blocks) -> "RowView":
        """Return the same view of other blocks."""
        products = Products(StoredProducts(blocks), self.rows, self.products.know_zero)
        return replace(self, blocks=blocks, products=products)

    @property
    def num_rows(self) -> int:
        """Number of rows, m."""
        return len(self.rows) if self.mixing is None else self.mixing.shape[0]

    @property
    def weights(self) -> Tensor:
        """The weights of the stored rows in each row, [m, n]."""
        return torch.eye(len(self.rows), dtype=torch.float64) if self.mixing is None else self.mixing

    @property
    def is_everything(self) -> bool:
        """Whether these are all stored rows, unchanged."""
        return self.mixing is None and torch.equal(self.rows, torch.arange(self.blocks.num_rows))

    def select(self, rows: Tensor) -> "RowView":
        """Keep the given rows only; without mixing, the other stored rows are not read any more."""
        if self.mixing is not None:
            return self.mix(torch.eye(self.num_rows, dtype=torch.float64)[rows])
        stored = self.rows[rows]
        return RowView(self.blocks, stored, self.products.select(stored))

    def mix(self, weights: Tensor) -> "RowView":
        """Replace the rows by affine combinations of them, with weights [k, m]."""
        return replace(self, mixing=weights.double() @ self.weights)

    def scale(self, factors: Tensor) -> "RowView":
        """Multiply each row by its factor, [m]."""
        return replace(self.mix(factors.double().diag()), products=self.products.serving(is_affine=False))

    def split(self, with_products: bool = True) -> list["RowView"]:
        """Return the same rows in the columns of each segment alone.

        Args:
            with_products: whether to compute the inner products of all segments together.

        """
        if with_products:
            self.products.compute_parts(sharply=True)
        return [replace(self, blocks=part.blocks, products=part) for part in self.products.parts]

    def largest_shares(self) -> Tensor:
        """Return the largest weight of each stored row in a sum of several, [n]; 0 if rows are unchanged."""
        if self.mixing is None:
            return torch.zeros(len(self.rows), dtype=torch.float64)
        return self.mixing.abs().amax(0)

    @property
    def gram(self) -> Gram:
        """The inner products of these rows, about an origin that leaves their distances sharp."""
        return self._points(self.products.gram)

    @property
    def rough_gram(self) -> Gram:
        """The same as far as known for all segments together."""
        return self._points(self.products.rough_gram)

    @property
    def exact_gram(self) -> Gram:
        """The same, accurate to float64."""
        return self._points(self.products.exact_gram)

    def mixed(self, chunk: Tensor, scratch: Scratch) -> Tensor:
        """Return these rows, [m, c], given a chunk of the n stored rows; only mixed rows use ``scratch``."""
        return chunk if self.mixing is None else self._mixed(chunk, self.mixing, scratch)

    def writable(self, chunk: Tensor, scratch: Scratch) -> Tensor:
        """Return the same as a copy that may be written to."""
        return scratch.like(chunk).copy_(chunk) if self.mixing is None else self.mixed(chunk, scratch)

    def compute(
        self,
        fill: Callable[[Tensor, Tensor], object],
        chunks_in: Callable[[torch.dtype], torch.dtype] = at_least_float32,
        result_in: Callable[[torch.dtype], torch.dtype] = at_least_float32,
        row_by_row: bool = False,
    ) -> list[Tensor]:
        """Return a vector, one [c_b] tensor for each block, computed in one pass.

        Args:
            fill: takes a chunk [n, c] of the rows that these are made of, and writes the vector's part [c].
            chunks_in: maps the dtype of a block to that of its chunks.
            result_in: maps it to that of the vector.
            row_by_row: whether ``fill`` goes through the rows one after the other.

        """
        vector = []
        for index, block in enumerate(self.blocks.arriving):
            vector.append(block.new_empty(block.shape[1], dtype=result_in(block.dtype)))
            for columns, chunk in self.blocks.chunks(index, self.rows, chunks_in, row_by_row):
                fill(chunk, vector[-1][columns])
        return vector

    def sum_over_columns(self, statistic: Callable[[Tensor, Callable[[list[Tensor]], Tensor]], Tensor]) -> Tensor:
        """Sum a float64 statistic [m] of chunks [m, c] over all columns of all ranks.

        Args:
            statistic: takes a chunk and ``at``; ``at(vector)`` is the part of a vector in the chunk's columns.

        """
        total = torch.zeros(self.num_rows, dtype=torch.float64, device=self.blocks.device)
        scratch = Scratch()
        for index in range(len(self.blocks.memory)):
            for columns, chunk in self.blocks.chunks(index, self.rows, float64):

                def at(vector: list[Tensor], index: int = index, columns: slice = columns) -> Tensor:
                    return vector[index][columns]

                total += statistic(self.mixed(chunk, scratch), at)
        return self.blocks.complete(total).cpu()

    def sketches(self, values: Sequence[Tensor], since: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
        """Return sketches of x_i, s and a - s, [m + 2, k], for a = ``values`` and s = ``since``; (||s||, ||a - s||)."""
        total = torch.zeros((self.num_rows + 2) * WIDTH + 2, dtype=torch.float64, device=self.blocks.device)
        sketches, squares = total[:-2].view(-1, WIDTH), total[-2:]
        dtypes = [at_least_float32(block.dtype) for block in self.blocks.memory]
        folded = {dtype: sketches.new_zeros(len(sketches), PERIOD, dtype=dtype) for dtype in dict.fromkeys(dtypes)}
        pairs, wide = Scratch(), Scratch()
        with all_digits(self.blocks.device.type):
            for index, (point, start) in enumerate(zip(values, since, strict=True)):
                sums = folded[dtypes[index]]
                for columns, chunk in self.blocks.chunks(index, self.rows, at_least_float32):
                    pair = pairs.rows(2, chunk)
                    torch.sub(point[columns], pair[0].copy_(start[columns]), out=pair[1])
                    for square, vector in zip(squares, pair, strict=True):
                        exact = wide.vector(vector.numel(), total).copy_(vector)
                        square += exact.dot(exact)
                    for part, place in self.blocks.runs(index, columns):
                        fold(chunk[:, part], place, out=sums[:-2])
                        fold(pair[:, part], place, out=sums[-2:])
        for sums in folded.values():
            sketches += sketches_of(sums)
        total = self.blocks.complete(total)
        return total[:-2].view(-1, WIDTH), total[-2:].sqrt()

    def squared_norms(self) -> Tensor:
        """Return ||x_i||^2, [m], in one pass."""
        return self.sum_over_columns(lambda chunk, _: chunk.square().sum(1))

    def quick_squared_norms(self) -> Tensor:
        """Return ||x_i||^2, [m], to six digits where float32 arithmetic is faster."""
        if not self.blocks.are_quick:
            return self.squared_norms()
        scratch = Scratch()
        norms = [
            torch.linalg.vector_norm(self.mixed(chunk, scratch), dim=1)
            for index in range(len(self.blocks.memory))
            for _, chunk in self.blocks.chunks(index, self.rows, at_least_float32)
        ]
        return self.blocks.complete(torch.stack(norms).double().square().sum(0)).cpu()

    def _points(self, gram: Gram) -> Gram:
        return gram if self.mixing is None else gram.points(self.mixing)

    def _mixed(self, chunk: Tensor, mixing: Tensor, scratch: Scratch) -> Tensor:
        if chunk.device.type != "cpu":
            mixed = scratch.rows(self.num_rows, chunk)
            for row, weights in zip(mixed, mixing, strict=True):
                weighted_sum(chunk, weights, out=row)
            return mixed
        # Otherwise the last columns, which don't fill vector registers, would be computed in another way, with other
        # last digits that depend on the chunk.
        missing = -chunk.shape[1] % _REGISTERS
        padded = nn.functional.pad(chunk, (0, missing)) if missing else chunk
        with all_digits(chunk.device.type):
            product = torch.mm(mixing.to(chunk.dtype), padded, out=scratch.rows(self.num_rows, padded))
        return product[:, : chunk.shape[1]]


def weighted_sum(rows: Tensor, weights: Tensor, out: Tensor) -> None:
    """Write sum_i w_i x_i of the rows whose weight is not 0.

    Args:
        rows: [n, c].
        weights: [n].
        out: [c].

    """
    # Row by row and without fused operations, not as a product of matrices: each coordinate is then the same to the bit
    # for any buckets of DDP and any chunks, which a resumed run needs. It also avoids autocast and TensorFloat-32,
    # which round to three digits.
    used = [(weight, rows[index]) for index, weight in enumerate(weights.tolist()) if weight != 0]
    groups = [(weight, [row for _, row in group]) for weight, group in groupby(used, key=itemgetter(0))]
    if not groups:  # a row that was scaled to 0
        out.zero_()
        return
    (weight, equal), *others = groups
    _scaled_sum(weight, equal, out)
    term = torch.empty_like(out) if others else out
    for weight, equal in others:
        _scaled_sum(weight, equal, term)
        out += term


def _scaled_sum(weight: float, rows: Sequence[Tensor], out: Tensor) -> None:
    """Write w sum_i x_i: neighbours of the same weight, as in a mean, are multiplied together."""
    if len(rows) == 1:
        torch.mul(rows[0], weight, out=out)
        return
    torch.add(rows[0], rows[1], out=out)
    for row in rows[2:]:
        out += row
    out *= weight
