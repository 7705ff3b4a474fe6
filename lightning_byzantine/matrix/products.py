"""Inner products of rows, computed once for all rules and views that need them."""

from collections.abc import Sequence
from functools import cached_property, reduce

import torch
from torch import Tensor, nn

from lightning_byzantine.matrix.anchored_gram import AnchoredGram
from lightning_byzantine.matrix.blocks import FEW, Blocks, at_least_float32, float64, in_chunks
from lightning_byzantine.matrix.gram import Gram, central_where_blunt, centred_gram
from lightning_byzantine.matrix.quick_products import all_digits, quick_gram, quick_products, rounding_of_exact
from lightning_byzantine.matrix.scratch import Scratch

__all__ = ["Products", "StoredProducts"]


class StoredProducts:
    """Inner products of all stored rows about 0, which include those of any selection.

    Non-finite rows only affect their own products.

    Args:
        blocks: the stored rows.

    """

    def __init__(self, blocks: Blocks) -> None:
        self.blocks = blocks
        self._knows_parts = False

    @cached_property
    def exact(self) -> Tensor:
        """The products in float64, [n, n]."""
        return self.about(None, torch.arange(self.blocks.num_rows), know_zero=False)

    @cached_property
    def quick(self) -> Gram | None:
        """The products where float32 arithmetic is faster, in some columns at least, with errors; None elsewhere."""
        if not self.blocks.are_quick:
            return None
        products = []
        for block in self.blocks.arriving:
            with all_digits(self.blocks.device.type):
                products.append(quick_products(block))
        sums = self.blocks.complete(torch.stack(products).sum(0))
        return quick_gram(sums.cpu(), self.blocks.most_columns)

    @cached_property
    def parts(self) -> list["StoredProducts"]:
        """The products in the columns of each segment, not computed yet."""
        return [StoredProducts(part) for part in self.blocks.split()] or [self]

    def compute_parts(self) -> None:
        """Compute the products of all segments together, and with them those of all columns, unless that was done."""
        groups, blocks = self.blocks.groups, self.blocks
        if self._knows_parts or not groups:
            return
        places = [(group, *place) for group in groups for place in group.places]
        products: dict[int, Tensor] = {}
        scratch = Scratch()
        with all_digits(blocks.device.type):
            for index, block in enumerate(blocks.arriving):
                for number, (group, of_block, columns) in enumerate(places):
                    if of_block == index:
                        products[number] = _products_about_zero(block[:, columns], blocks.are_quick_in(group), scratch)
        are_quick = torch.tensor([blocks.are_quick_in(group) for group in groups])
        # With what bounds the errors, where any are quick.
        shape = len(groups), 2 if blocks.are_quick else 1, blocks.num_rows, blocks.num_rows
        sums = torch.zeros(shape, dtype=torch.float64, device=blocks.device)
        # In the order of the parameters: the same to the bit wherever DDP has put them.
        in_order = iter(sorted(products))
        for group, is_quick, of_group in zip(groups, are_quick.tolist(), sums, strict=True):
            for _ in group.places:
                (of_group if is_quick else of_group[0]).add_(products[next(in_order)])
        if blocks.are_quick:
            sums[~are_quick, 1] = rounding_of_exact(sums[~are_quick, 0])
        sums = blocks.complete(sums).cpu()
        for stored, of_stored in zip([self, *self.parts], [sums.sum(0), *sums], strict=True):
            # These are cached properties.
            if stored.blocks.are_quick:
                stored.quick = quick_gram(of_stored, stored.blocks.most_columns)
            else:
                stored.exact = of_stored[0]
        self._knows_parts = True

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
            for _, chunk in self.blocks.chunks(index, rows, at_least_float32):
                if know_zero:
                    chunk = nn.functional.pad(chunk, (0, 0, 0, 1))
                seen = _in_float64(chunk)
                if origin is not None:
                    seen -= seen[:, origin, None].clone()
                total.addmm_(seen.T, seen)
        return self.blocks.complete(total).cpu()


class Products:
    """The inner products of some of the stored rows: in float32 if that is accurate enough, otherwise in float64.

    All views and points of the same rows share them, so that they cost one pass over the columns, or two.

    Args:
        stored: the products of all stored rows.
        rows: [n], indices of the rows whose products these are.
        know_zero: whether 0 counts as one more row, which gives lengths in addition to distances.

    """

    def __init__(self, stored: StoredProducts, rows: Tensor, know_zero: bool = False) -> None:
        self.know_zero = know_zero
        self._stored = stored
        self._rows = rows
        self._rough: Gram | None = None
        self._sharp: Gram | None = None

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
        if self._sharp is None:
            is_sharp = self._rough is not None and self._rough.is_sharp()
            self._sharp = self._rough if is_sharp else self._sharp_quick_gram() or self._exact_gram()
        assert self._sharp is not None
        return self._sharp

    @property
    def exact_gram(self) -> Gram:
        """The products, accurate to float64."""
        if self.gram.errors.any():
            self._sharp = self._exact_gram()
        return self.gram

    @property
    def rough_gram(self) -> Gram:
        """The products as far as they were computed for all segments together, of which some may not be sharp."""
        return self.gram if self._rough is None else self._rough

    @property
    def known_gram(self) -> Gram | None:
        """The products, if already computed; they may be rough."""
        return self._rough if self._sharp is None else self._sharp

    def squared_norms(self) -> Tensor:
        """Return ||x_i||^2, [n], without a separate pass."""
        return self._stored.squared_norms()[self._rows]

    @property
    def blocks(self) -> Blocks:
        """The stored rows."""
        return self._stored.blocks

    @property
    def num_rows(self) -> int:
        """Number of rows whose products these are, n."""
        return len(self._rows)

    @cached_property
    def parts(self) -> list["Products"]:
        """The products in the columns of each segment, not computed yet."""
        if not self.blocks.groups:
            return [self]
        return [Products(part, self._rows, self.know_zero) for part in self._stored.parts]

    def compute_parts(self, sharply: bool) -> None:
        """Compute the products of all :attr:`parts` together, unless they are known.

        Args:
            sharply: whether for distances between these rows, not only for norms of all that are stored.

        """
        self._stored.compute_parts()
        # Those with 0, of rows that were scaled, are left for when they are needed.
        if sharply and not self.know_zero:
            _sharpen([part for part in self.parts if part.known_gram is None])

    def know_about_zero(self) -> None:
        """Set the rough products to those about 0."""
        stored = self._stored
        about_zero = Gram(stored.exact, torch.zeros_like(stored.exact)) if stored.quick is None else stored.quick
        self._rough = about_zero.rows(self._rows)

    def know_about_row(self, sums: Tensor) -> None:
        """Set the rough products to the sums over all ranks of :meth:`add_about_row`."""
        if self._is_quick_about_row:
            self._rough = quick_gram(sums, self.blocks.most_columns)
        else:
            self._rough = Gram(sums[0], torch.zeros_like(sums[0]))

    def add_about_row(self, row: int, sums: Tensor) -> None:
        """Add this rank's part of the products about one of the rows, and what bounds their errors, to [2, n, n]."""
        blocks, is_quick = self.blocks, self._is_quick_about_row
        scratch = Scratch()
        for index in range(len(blocks.memory)):
            for _, chunk in blocks.chunks(index, self._rows, at_least_float32 if is_quick else float64):
                seen = torch.sub(chunk, chunk[row], out=scratch.like(chunk))
                if is_quick:
                    sums += quick_products(seen)
                else:
                    sums[0].addmm_(seen, seen.T)

    @property
    def _is_quick_about_row(self) -> bool:
        return self.blocks.are_quick and self.blocks.most_columns > FEW

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


def _sharpen(products: Sequence[Products]) -> None:
    """Compute products about 0 and, for those that lost too many digits, about a row amid the others.

    The latter for all together, with one sum over ranks and, as in :func:`centred_gram`, another one where it was not
    known before which row is amid the others.
    """
    origins: dict[Products, int | None] = dict.fromkeys(products)
    for part in products:
        part.know_about_zero()
    for _ in range(2 if products else 0):
        found = zip(products, central_where_blunt([part.rough_gram for part in products]), strict=True)
        moves = {part: row for part, row in found if row is not None and row != origins[part]}
        if not moves:
            break
        blocks, num_rows = products[0].blocks, products[0].num_rows
        sums = torch.zeros(len(moves), 2, num_rows, num_rows, dtype=torch.float64, device=blocks.device)
        with all_digits(blocks.device.type):
            for (part, row), of_part in zip(moves.items(), sums, strict=True):
                part.add_about_row(row, of_part)
        for part, of_part in zip(moves, blocks.complete(sums).cpu(), strict=True):
            part.know_about_row(of_part)
        origins |= moves


def _products_about_zero(rows: Tensor, are_quick: bool, scratch: Scratch) -> Tensor:
    """Return inner products in float64, [n, n], or what :func:`quick_gram` needs, [2, n, n]."""
    # The last digits of products depend on strides and alignment, which a copy has always the same.
    chunks = in_chunks(rows, rows.shape[0], torch.float32 if are_quick else torch.float64)
    if are_quick:
        products = (quick_products(scratch.like(chunk).copy_(chunk)) for _, chunk in chunks)
    else:
        products = (seen.T @ seen for seen in (_in_float64(chunk) for _, chunk in chunks))
    return reduce(Tensor.add_, products)


def _in_float64(chunk: Tensor) -> Tensor:
    """Return a copy [c, m] of rows [m, c] in float64, from which their inner products take a third of the time."""
    return torch.empty(*chunk.T.shape, dtype=torch.float64, device=chunk.device).copy_(chunk.T)
