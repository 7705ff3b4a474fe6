"""Inner products of rows, taken once for all rules and views that need them."""

from functools import cached_property

import torch
from torch import Tensor, nn

from lightning_byzantine.matrix.anchored_gram import AnchoredGram
from lightning_byzantine.matrix.blocks import Blocks, float64
from lightning_byzantine.matrix.gram import Gram, centred_gram
from lightning_byzantine.matrix.quick_products import quick_gram, quick_products

__all__ = ["Products", "StoredProducts"]


class StoredProducts:
    """Inner products of all stored rows about 0, from which those of any selection can be read.

    Rows that are not finite spoil their own products only.

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
        """The products by float32 arithmetic, with their errors, where that is quicker; None elsewhere."""
        if not self.blocks.are_quick:
            return None
        sums = self.blocks.complete(torch.stack([quick_products(block) for block in self.blocks.arriving]).sum(0))
        # Every rank holds as many columns of each of the rows, or all of them.
        return quick_gram(sums, num_columns=self.blocks.num_rows * self.blocks.num_columns)

    def squared_norms(self) -> Tensor:
        """Return ||x_i||^2, [n], from what distances need as well: an accelerator is waited for once."""
        return (self.exact if self.quick is None else self.quick.products).diagonal()

    def about(self, origin: int | None, rows: Tensor, know_zero: bool) -> Tensor:
        """Return the inner products of some rows as seen from one of them, in a pass of their own.

        Args:
            origin: index into ``rows``, or into those and 0; None for 0.
            rows: indices of stored rows.
            know_zero: whether 0 is a row as well, the last one.

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
    """The inner products of some of the stored rows: in float32 where that is sharp enough, else with all digits.

    Whatever is made of the same rows shares them, so that they cost one pass over the columns, or two.

    Args:
        stored: those of all stored rows.
        rows: [n], indices of the rows whose products these are.
        know_zero: whether 0 counts as one more row, which makes lengths known and not only distances.

    Attributes:
        known_gram: the products, if they have been computed already.

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
        """Return what tells distances from a combination, whose weights sum to 1 if it is affine: else 0 has a part."""
        return self if is_affine or self.know_zero else self._with_zero

    @cached_property
    def _with_zero(self) -> "Products":
        return Products(self._stored, self._rows, know_zero=True)

    @property
    def gram(self) -> Gram:
        """The products, about an origin that leaves the rows' distances sharp."""
        if self.known_gram is None:
            self.known_gram = self._sharp_quick_gram() or self._exact_gram()
        return self.known_gram

    @property
    def exact_gram(self) -> Gram:
        """The products with all the digits of float64."""
        if self.gram.errors.any():
            self.known_gram = self._exact_gram()
        return self.gram

    def squared_norms(self) -> Tensor:
        """Return ||x_i||^2, [n], without a pass of their own."""
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
