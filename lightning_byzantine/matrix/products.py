"""Inner products of rows, computed once for all rules and views that need them."""

from functools import cached_property

import torch
from torch import Tensor, nn

from lightning_byzantine.matrix.anchored_gram import AnchoredGram
from lightning_byzantine.matrix.blocks import Blocks, float64
from lightning_byzantine.matrix.gram import Gram, centred_gram
from lightning_byzantine.matrix.quick_products import quick_gram, quick_products

__all__ = ["Products", "StoredProducts"]


class StoredProducts:
    """Inner products of all stored rows about 0, which include those of any selection.

    Non-finite rows only affect their own products.

    Args:
        blocks: the stored rows.

    """

    def __init__(self, blocks: Blocks) -> None:
        self.blocks = blocks

    @cached_property
    def exact(self) -> Tensor:
        """The products in float64, [n, n]."""
        return self.about(None, torch.arange(self.blocks.num_rows), know_zero=False)

    @cached_property
    def quick(self) -> Gram | None:
        """The products in float32 arithmetic, with their errors, where that is faster; None elsewhere."""
        if not self.blocks.are_quick:
            return None
        sums = self.blocks.complete(torch.stack([quick_products(block) for block in self.blocks.arriving]).sum(0))
        # Every rank holds the same number of columns, or all of them.
        return quick_gram(sums, num_columns=self.blocks.num_rows * self.blocks.num_columns)

    def squared_norms(self) -> Tensor:
        """Return ||x_i||^2, [n], from the products that distances need as well, which synchronizes a GPU only once."""
        return (self.exact if self.quick is None else self.quick.products).diagonal()

    def about(self, origin: int | None, rows: Tensor, know_zero: bool) -> Tensor:
        """Return the inner products of some rows about one of them, in a separate pass.

        Args:
            origin: index into ``rows``, or into these and 0; None for 0.
            rows: indices of stored rows.
            know_zero: whether to append 0 as the last row.

        """
        size = len(rows) + know_zero
        total = torch.zeros(size, size, dtype=torch.float64, device=self.blocks.device)
        for index in range(len(self.blocks.memory)):
            for _, chunk in self.blocks.chunks(index, rows, float64):
                if know_zero:
                    chunk = nn.functional.pad(chunk, (0, 0, 0, 1))
                seen = chunk if origin is None else chunk - chunk[origin]
                total.addmm_(seen, seen.T)
        return self.blocks.complete(total).cpu()


class Products:
    """The inner products of some of the stored rows: in float32 if that is accurate enough, otherwise in float64.

    All views and points of the same rows share them, so that they cost one pass over the columns, or two.

    Args:
        stored: the products of all stored rows.
        rows: [n], indices of the rows whose products these are.
        know_zero: whether 0 counts as one more row, which gives lengths in addition to distances.

    Attributes:
        known_gram: the products, if already computed.

    """

    def __init__(self, stored: StoredProducts, rows: Tensor, know_zero: bool = False) -> None:
        self.know_zero = know_zero
        self._stored = stored
        self._rows = rows
        self.known_gram: Gram | None = None

    def select(self, rows: Tensor) -> "Products":
        """Return the products of other stored rows."""
        return Products(self._stored, rows)

    def serving(self, is_affine: bool) -> "Products":
        """Return the products for distances from a combination, with 0 unless it is affine (weights sum to 1)."""
        return self if is_affine or self.know_zero else self._with_zero

    @cached_property
    def _with_zero(self) -> "Products":
        return Products(self._stored, self._rows, know_zero=True)

    @property
    def gram(self) -> Gram:
        """The products, about an origin for which the rows' distances are accurate."""
        if self.known_gram is None:
            self.known_gram = self._sharp_quick_gram() or self._exact_gram()
        return self.known_gram

    @property
    def exact_gram(self) -> Gram:
        """The products, accurate to float64."""
        if self.gram.errors.any():
            self.known_gram = self._exact_gram()
        return self.gram

    def squared_norms(self) -> Tensor:
        """Return ||x_i||^2, [n], without a separate pass."""
        return self._stored.squared_norms()[self._rows]

    def _sharp_quick_gram(self) -> Gram | None:
        quick = self._stored.quick
        if quick is None:
            return None
        selected = quick.rows(self._rows)
        if self.know_zero:
            selected = AnchoredGram.about_zero(selected)
        return selected if selected.is_sharp() else None

    def _exact_gram(self) -> Gram:
        def about(origin: int | None) -> Tensor:
            if origin is None and not self._stored.blocks.are_quick and not self.know_zero:
                return self._stored.exact[self._rows][:, self._rows]
            return self._stored.about(origin, self._rows, self.know_zero)

        products = centred_gram(about)
        return (AnchoredGram if self.know_zero else Gram)(products, torch.zeros_like(products))
