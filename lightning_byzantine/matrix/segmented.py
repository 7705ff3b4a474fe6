"""Points whose segments were computed separately."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from lightning_byzantine.matrix.blocks import at_least_float32, float64
from lightning_byzantine.matrix.points import Combination, LazyPoint
from lightning_byzantine.matrix.row_view import RowView

__all__ = ["Segmented"]


@dataclass(frozen=True)
class Segmented(LazyPoint):
    """A point of which the columns of each segment are those of another point.

    Args:
        made_of: the rows.
        points: for each used segment, a point in its columns alone, computed from ``made_of.split()``.

    """

    made_of: RowView
    points: Sequence[LazyPoint]

    @property
    def weights(self) -> Tensor | None:
        """The weights of the stored rows, [n], averaged over all columns; None if a point is no combination of rows."""
        known = [point.weights for point in self.points if isinstance(point, Combination)]
        return self.shares @ torch.stack(known) if len(known) == len(self.points) else None

    @property
    def shares(self) -> Tensor:
        """The fraction of all columns that each segment has, [s] float64."""
        sizes = torch.tensor([group.size for group in self.made_of.blocks.groups], dtype=torch.float64)
        return sizes / sizes.sum()

    def values(self, view: RowView) -> list[Tensor]:
        """Return the values of all segments; 0 in columns that are in none."""
        first, known = self.points[0], [point.weights for point in self.points if isinstance(point, Combination)]
        if isinstance(first, Combination) and len(known) == len(self.points) and (torch.stack(known) == known[0]).all():
            # In large chunks: usual where nobody attacks, and several times as fast for many small segments.
            return first.values(self.made_of)
        return self._joined(lambda point, of_part: point.values(of_part), at_least_float32)

    def exact_values(self, view: RowView) -> list[Tensor]:
        """Return the same as accurate as if no value had been rounded to less than float64."""
        return self._joined(lambda point, of_part: point.exact_values(of_part), float64)

    def squared_distances(self, view: RowView) -> tuple[Tensor, Tensor]:
        """Return the sums of the segments' squared distances, and of their errors."""
        views = view.split(with_products=any(isinstance(point, Combination) for point in self.points))
        pairs = [point.squared_distances(of_part) for point, of_part in zip(self.points, views, strict=True)]
        squared, errors = map(torch.stack, zip(*pairs, strict=True))
        return squared.sum(0), errors.sum(0)

    def known_products(self, view: RowView) -> Tensor | None:
        """Return the sums of the segments' inner products about their points, if all are known."""
        pairs = zip(self.points, view.split(with_products=False), strict=True)
        known = [products for point, part in pairs if (products := point.known_products(part)) is not None]
        return torch.stack(known).sum(0) if len(known) == len(self.points) else None

    def _joined(
        self,
        values_of: Callable[[LazyPoint, RowView], list[Tensor]],
        result_in: Callable[[torch.dtype], torch.dtype],
    ) -> list[Tensor]:
        blocks = self.made_of.blocks
        vector = [block.new_zeros(block.shape[1], dtype=result_in(block.dtype)) for block in blocks.memory]
        views = self.made_of.split(with_products=False)
        for group, point, of_part in zip(blocks.groups, self.points, views, strict=True):
            for columns, values in zip(group.of(vector), values_of(point, of_part), strict=True):
                columns.copy_(values)
        return vector
