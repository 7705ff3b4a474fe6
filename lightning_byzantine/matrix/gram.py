"""Distances from inner products."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

__all__ = [
    "ROUNDING",
    "Gram",
    "are_sharp",
    "central_where_blunt",
    "centred_gram",
    "differences",
    "lost_digits",
    "most_central_row",
    "most_central_rows",
    "sums_of_squares",
]

# A squared distance below this fraction of the squared norms has lost too many of their 16 digits to cancellation.
_LOST = 1e-6
# Below this fraction it is only rounding error.
ROUNDING = 1e-13
# A squared distance is sharp if its relative error is at most this.
_SHARP = 1e-6


@dataclass(frozen=True)
class Gram:
    """Inner products of rows relative to some origin, with bounds of their rounding errors.

    Args:
        products: [m, m] float64, or [s, m, m] of several matrices, for distances and central rows alone.
        errors: the same shape, 0 where products are accurate to float64.

    Example:
        >>> import torch
        >>> gram = Gram(torch.tensor([[1.0, 0.0], [0.0, 4.0]]), torch.zeros(2, 2))
        >>> gram.squared_distances()
        (tensor([[0., 5.],
                [5., 0.]]), tensor([[0., 0.],
                [0., 0.]]))

    """

    products: Tensor
    errors: Tensor

    @classmethod
    def of_several(cls, grams: "Sequence[Gram]") -> "Gram":
        """Return several Gram matrices as one, [s, m, m]."""
        return cls(torch.stack([gram.products for gram in grams]), torch.stack([gram.errors for gram in grams]))

    def rows(self, indices: Tensor) -> "Gram":
        """Keep some rows only."""
        if torch.equal(indices, torch.arange(len(self.products))):
            return self
        return Gram(self.products[indices][:, indices], self.errors[indices][:, indices])

    def mixed(self, weights: Tensor) -> "Gram":
        """Return the Gram matrix of sum_j weights[i, j] x_j; the origin is arbitrary if weights sum to 1, or to 0."""
        size = self._with_origin(weights).abs()
        return Gram(self.mixed_products(weights), size @ self.errors @ size.T)

    def mixed_products(self, weights: Tensor) -> Tensor:
        """Return the products of :meth:`mixed` alone."""
        weights = self._with_origin(weights)
        return weights @ self.products @ weights.T

    def points(self, weights: Tensor) -> "Gram":
        """Return the Gram matrix of the points sum_j weights[i, j] x_j, about any origin."""
        return self.mixed(weights)

    def about(self, weights: Tensor, row: int) -> "Gram":
        """Return the Gram matrix of the points sum_j weights[i, j] x_j about one of them, exactly 0 for its copies.

        Its errors are likely ones: those of different products are independent. They include what rounding in float64
        takes where the origin is far from the points.
        """
        copies = self.points(weights).squared_distances()[0][row] == 0
        seen = weights - weights[row]
        lengths = self._longest(seen)
        likely = replace(self, errors=self.errors.square()).mixed(seen.square()).errors.sqrt()
        errors = likely + ROUNDING * lengths * lengths[:, None]
        return Gram(*(part.masked_fill(copies | copies[:, None], 0) for part in (self.mixed(seen).products, errors)))

    def squared_norms(self) -> tuple[Tensor, Tensor]:
        """Return ||x_i - o||^2, [m], and their errors."""
        return self.products.diagonal().clamp(min=0), self.errors.diagonal()

    def squared_distances(self) -> tuple[Tensor, Tensor]:
        """Return ||x_i - x_j||^2, [m, m], and their errors.

        A squared distance below 1e-13 of the squared norms, relative to the origin, counts as 0.
        """
        errors = sums_of_squares(self.errors).add_(self.errors, alpha=2)
        errors.diagonal(dim1=-2, dim2=-1).zero_()
        return _squared_distances(self.products), errors

    def central_rows(self) -> Tensor:
        """Return a row of each matrix that is amid the others, [..]."""
        return most_central_rows(_squared_distances(self.products))

    def is_sharp(self) -> bool:
        """Return whether all distances between rows are known to six digits."""
        return are_sharp(*self.squared_distances())

    def _longest(self, weights: Tensor) -> Tensor:
        """Return upper bounds of the lengths of sum_j weights[i, j] x_j, to which rounding is in proportion."""
        return self._with_origin(weights).abs() @ self.products.diagonal().clamp(min=0).sqrt()

    def _with_origin(self, weights: Tensor) -> Tensor:
        """Return weights [k, m] of rows as those of all rows of the products."""
        return weights


def are_sharp(squared_distances: Tensor, errors: Tensor) -> bool:
    """Return whether all squared distances are known to six digits."""
    return bool((errors <= _SHARP * squared_distances).all())


def central_where_blunt(grams: Sequence[Gram]) -> list[int | None]:
    """Return a row amid the others of each Gram matrix that lost too many digits; None of the others."""
    together = Gram.of_several(grams)
    squared, errors = together.squared_distances()
    are_blunt = (errors > _SHARP * squared).flatten(1).any(1)
    # Those without errors are accurate to float64, which may not be enough.
    are_exact = ~errors.flatten(1).any(1)
    are_blunt[are_exact] = lost_digits(together.products[are_exact])
    central: list[int | None] = [None] * len(grams)
    if are_blunt.any():
        for index, row in zip(are_blunt.nonzero(), most_central_rows(squared[are_blunt]), strict=True):
            central[int(index)] = int(row)
    return central


def centred_gram(gram: Callable[[int | None], Tensor]) -> Tensor:
    """Return the inner products of rows about 0 or, if that is not accurate enough, about one of the rows.

    ||x_i||^2 + ||x_j||^2 - 2 x_i.x_j loses all digits when rows share an offset far larger than their spread, which is
    normal under momentum. Only then the origin moves, to a row that is near to at least half of the rows, so that
    attackers can't move it far from the honest rows. Every product involves only its own two rows and the origin, so
    that no other row can reduce its accuracy, as it could if the origin were the mean.

    Args:
        gram: computes (x_i - o).(x_j - o), [m, m] float64, where o is the row of that index, or 0 for None. Costs
            one pass over the columns.

    Example:
        >>> import torch
        >>> rows = 1e9 + torch.tensor([[0.0], [1.0], [3.0]], dtype=torch.float64)
        >>> def gram(origin: int | None) -> Tensor:
        ...     seen = rows if origin is None else rows - rows[origin]
        ...     return seen @ seen.T
        >>> Gram(centred_gram(gram), torch.zeros(3, 3)).squared_distances()[0]
        tensor([[0., 1., 9.],
                [1., 0., 4.],
                [9., 4., 0.]], dtype=torch.float64)

    """
    origin: int | None = None
    products = gram(origin)
    for _ in range(2):
        if not lost_digits(products):
            break
        central = most_central_row(_squared_distances(products))
        if central == origin:
            break
        origin = central
        products = gram(origin)
    return products


def sums_of_squares(products: Tensor) -> Tensor:
    """Return ||x_i||^2 + ||x_j||^2, [m, m], from inner products [m, m]."""
    squares = products.diagonal(dim1=-2, dim2=-1)
    return squares[..., None, :] + squares[..., None]


def differences(products: Tensor) -> Tensor:
    """Return ||x_i||^2 + ||x_j||^2 - 2 x_i.x_j, [m, m], rounding included."""
    return sums_of_squares(products).sub_(products, alpha=2)


def _squared_distances(gram: Tensor) -> Tensor:
    sums = sums_of_squares(gram)
    squared = torch.sub(sums, gram, alpha=2)
    # Identical rows, such as colluders', must tie exactly.
    squared.masked_fill_(squared <= ROUNDING * sums, 0)
    squared.diagonal(dim1=-2, dim2=-1).zero_()
    return squared


def lost_digits(gram: Tensor) -> Tensor:
    """Return whether some squared distances have lost too many digits, [..] bool, given inner products [.., m, m]."""
    close = differences(gram) < _LOST * sums_of_squares(gram)
    close.diagonal(dim1=-2, dim2=-1).fill_(False)
    return close.flatten(-2).any(-1)


def most_central_row(distances: Tensor) -> int:
    """Return the row with the smallest distance to a majority: it is within two honest diameters of every honest row.

    Args:
        distances: [m, m], squared or not.

    Example:
        >>> import torch
        >>> most_central_row(torch.tensor([[0.0, 9.0, 8.0], [9.0, 0.0, 1.0], [8.0, 1.0, 0.0]]))
        1

    """
    return int(most_central_rows(distances))


def most_central_rows(distances: Tensor) -> Tensor:
    """Return the same of several matrices, [..], from [.., m, m]."""
    majority = distances.shape[-1] // 2
    return distances.kthvalue(majority + 1, dim=-1).values.argmin(-1)
