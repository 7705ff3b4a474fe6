"""Inner products of rows, computed once for all rules and views that need them."""

from collections.abc import Sequence
from functools import cached_property

import torch
from torch import Tensor, nn

from lightning_byzantine.matrix.anchored_gram import AnchoredGram
from lightning_byzantine.matrix.blocks import Blocks, at_least_float32, float64
from lightning_byzantine.matrix.gram import Gram, centred_gram, lost_digits, most_central_row
from lightning_byzantine.matrix.quick_products import quick_gram, quick_products

__all__ = ["Products", "StoredProducts", "sharpen"]


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

    @cached_property
    def split(self) -> list["StoredProducts"]:
        """The products in the columns of each segment, computed together, and with them those of all columns."""
        groups, blocks = self.blocks.groups, self.blocks
        if groups is None:
            return [self]
        shape = (len(groups.names), *([2] if blocks.are_quick else []), blocks.num_rows, blocks.num_rows)
        sums = torch.zeros(shape, dtype=torch.float64, device=blocks.device)
        for index, block in enumerate(blocks.arriving):
            for group, part in groups.of(block, index):
                sums[group] += quick_products(part) if blocks.are_quick else _exact_products(part)
        sums = blocks.complete(sums).cpu()
        parts = [StoredProducts(part) for part in blocks.split()]
        for stored, of_stored in zip([self, *parts], [sums.sum(0), *sums], strict=True):
            # These are cached properties.
            if blocks.are_quick:
                stored.quick = quick_gram(of_stored, blocks.num_rows * blocks.num_columns)
            else:
                stored.exact = of_stored
        return parts

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

    @property
    def blocks(self) -> Blocks:
        """The stored rows."""
        return self._stored.blocks

    def split(self) -> list["Products"]:
        """Return the products in the columns of each segment."""
        return [Products(part, self._rows, self.know_zero) for part in self._stored.split]

    def know_sharply(self) -> bool:
        """Make :attr:`known_gram` the products about 0 if these are accurate enough, and return whether they are."""
        if self.known_gram is None and not self.know_zero:
            if self._stored.blocks.are_quick:
                self.known_gram = self._sharp_quick_gram()
            elif not lost_digits(exact := self._stored.exact[self._rows][:, self._rows]):
                self.known_gram = Gram(exact, torch.zeros_like(exact))
        return self.known_gram is not None

    def central_row(self) -> int:
        """Return the index of a row amid the others, by products about 0."""
        stored = self._stored
        roughly = Gram(stored.exact, torch.zeros_like(stored.exact)) if stored.quick is None else stored.quick
        return most_central_row(roughly.rows(self._rows).squared_distances()[0])

    def products_about(self, row: int) -> Tensor:
        """Return what :func:`quick_gram` needs for products about one of the rows, without the sum over ranks."""
        blocks = self._stored.blocks
        sums = torch.zeros(2, len(self._rows), len(self._rows), dtype=torch.float64, device=blocks.device)
        for index in range(len(blocks.memory)):
            for _, chunk in blocks.chunks(index, self._rows, at_least_float32 if blocks.are_quick else float64):
                seen = chunk - chunk[row]
                if blocks.are_quick:
                    sums += quick_products(seen)
                else:
                    sums[0] += seen @ seen.T
        return sums

    def know(self, sums: Tensor) -> None:
        """Make :attr:`known_gram` the sums over all ranks of :meth:`products_about`."""
        blocks = self._stored.blocks
        if blocks.are_quick:
            self.known_gram = quick_gram(sums, blocks.num_rows * blocks.num_columns)
        else:
            self.known_gram = Gram(sums[0], torch.zeros_like(sums[0]))

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


def sharpen(products: Sequence[Products]) -> None:
    """Compute all products that lost too many digits again, about a row amid the others, with one sum over ranks.

    Products with 0, of rows that were scaled, are left for when they are needed.
    """
    blunt = [part for part in products if not part.know_zero and not part.know_sharply()]
    if not blunt:
        return
    sums = torch.stack([part.products_about(part.central_row()) for part in blunt])
    sums = blunt[0].blocks.complete(sums).cpu()
    for part, of_part in zip(blunt, sums, strict=True):
        part.know(of_part)


def _exact_products(rows: Tensor) -> Tensor:
    seen = rows.double()
    return seen @ seen.T
