"""Inner products for combinations whose weights don't sum to 1."""

import torch
from torch import Tensor, nn

from lightning_byzantine.matrix.gram import ROUNDING, Gram, differences, most_central_row

__all__ = ["AnchoredGram"]


class AnchoredGram(Gram):
    """Inner products of rows and of 0, relative to some origin.

    A combination sum_j w_j x_j whose weights sum to s also has the weight 1 - s of 0. So scaled rows need the position
    of 0, even if the origin was moved to keep distances accurate.

    Args:
        products: [m + 1, m + 1] float64, with 0 as the last row.
        errors: [m + 1, m + 1] float64, 0 where products are accurate to float64.

    Example:
        >>> rows = Gram(torch.tensor([[1.0, 1.0], [1.0, 5.0]]), torch.zeros(2, 2))  # (1, 0) and (1, 2)
        >>> AnchoredGram.about_zero(rows).points(torch.tensor([[3.0, 0.0], [0.0, 1.0]])).squared_distances()[0]
        tensor([[0., 8.],
                [8., 0.]])

    """

    @classmethod
    def about_zero(cls, gram: Gram) -> "AnchoredGram":
        """Add the row 0 to a Gram matrix about 0."""
        return cls(*(nn.functional.pad(part, (0, 1, 0, 1)) for part in (gram.products, gram.errors)))

    def points(self, weights: Tensor) -> Gram:
        """Return the same about a central point, so that a common offset of the points costs no accuracy."""
        central = most_central_row(self.mixed(weights).squared_distances()[0])
        seen = weights - weights[central]
        gram = self.mixed(seen)
        # Parallel rows may be scaled to the same point up to rounding: they must tie.
        terms = self._longest(seen).square()
        same = differences(gram.products) <= ROUNDING * (terms + terms[:, None])
        return gram.rows(same.int().argmax(1))

    def _with_origin(self, weights: Tensor) -> Tensor:
        # Then the combinations are about 0.
        return torch.cat([weights, -weights.sum(1, keepdim=True)], dim=1)
