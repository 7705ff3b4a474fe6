"""Inner products for combinations whose weights don't sum to 1."""

import torch
from torch import Tensor, nn

from lightning_byzantine.matrix.gram import ROUNDING, Gram, differences, most_central_row

__all__ = ["AnchoredGram"]


class AnchoredGram(Gram):
    """Inner products of rows and of 0, as seen from some origin.

    A combination sum_j w_j x_j whose weights sum to s also has the weight 1 - s of 0: where rows are scaled, it matters
    where 0 is, however far the origin has moved for the sake of the distances.

    Args:
        products: [m + 1, m + 1] float64, 0 the last of the rows.
        errors: [m + 1, m + 1] float64, 0 where all digits of float64 are right.

    Example:
        >>> rows = Gram(torch.tensor([[1.0, 1.0], [1.0, 5.0]]), torch.zeros(2, 2))  # (1, 0) and (1, 2)
        >>> AnchoredGram.about_zero(rows).points(torch.tensor([[3.0, 0.0], [0.0, 1.0]])).squared_distances()[0]
        tensor([[0., 8.],
                [8., 0.]])

    """

    @classmethod
    def about_zero(cls, gram: Gram) -> "AnchoredGram":
        """Add 0 to the rows of a Gram matrix whose origin it is."""
        return cls(*(nn.functional.pad(part, (0, 1, 0, 1)) for part in (gram.products, gram.errors)))

    def mixed(self, weights: Tensor) -> Gram:
        """Return that of sum_j weights[i, j] x_j about 0.

        Args:
            weights: [k, m].

        """
        return super().mixed(_with_zero(weights))

    def points(self, weights: Tensor) -> Gram:
        """Return the same from amid the points, so that what they have in common takes no digits from distances."""
        central = most_central_row(self.mixed(weights).squared_distances()[0])
        seen = weights - weights[central]
        gram = self.mixed(seen)
        # Rows of one direction and of several lengths may be scaled to the same point, but for rounding: they must tie.
        terms = (_with_zero(seen).abs() @ self.products.diagonal().sqrt()).square()
        same = differences(gram.products) <= ROUNDING * (terms + terms[:, None])
        return gram.rows(same.int().argmax(1))


def _with_zero(weights: Tensor) -> Tensor:
    return torch.cat([weights, -weights.sum(1, keepdim=True)], dim=1)
