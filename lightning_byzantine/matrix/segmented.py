"""Points whose segments were computed separately."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from lightning_byzantine.matrix.blocks import at_least_float32
from lightning_byzantine.matrix.points import Combination, LazyPoint
from lightning_byzantine.matrix.row_view import RowView

__all__ = ["Segmented"]


@dataclass(frozen=True)
class Segmented(LazyPoint):
    """A point of which the columns of each segment are those of another point.

    Args:
        made_of: the rows.
        points: for each segment, a point in its columns alone, computed from ``made_of.split()``.

    """

    made_of: RowView
    points: Sequence[LazyPoint]

    @property
    def weights(self) -> Tensor | None:
        """The weights of the stored rows, [n], averaged over all columns; None if a point is no combination of rows."""
        groups = self.made_of.blocks.groups
        assert groups is not None
        known = [point.weights for point in self.points if isinstance(point, Combination)]
        if len(known) < len(self.points):
            return None
        sizes = torch.tensor(groups.sizes, dtype=torch.float64)
        return sizes / sizes.sum() @ torch.stack(known)

    def values(self, view: RowView) -> list[Tensor]:
        """Return the values of all segments; 0 in columns that are in none."""
        blocks, groups = self.made_of.blocks, self.made_of.blocks.groups
        assert groups is not None
        vector = [block.new_zeros(block.shape[1], dtype=at_least_float32(block.dtype)) for block in blocks.memory]
        parts = [
            iter(point.values(of_segment)) for point, of_segment in zip(self.points, self.made_of.split(), strict=True)
        ]
        for index, whole in enumerate(vector):
            for segment, columns in groups.of(whole, index):
                columns.copy_(next(parts[segment]))
        return vector

    def squared_distances(self, view: RowView) -> tuple[Tensor, Tensor]:
        """Return the sums of the segments' squared distances, and of their errors."""
        squared, errors = zip(
            *(point.squared_distances(of_segment) for point, of_segment in zip(self.points, view.split(), strict=True)),
            strict=True,
        )
        return torch.stack(squared).sum(0), torch.stack(errors).sum(0)

    def known_squared_distances(self, view: RowView) -> Tensor | None:
        """Return the sums of the segments' squared distances, if all are known."""
        pairs = zip(self.points, view.split(), strict=True)
        known = [
            squared for point, of_segment in pairs if (squared := point.known_squared_distances(of_segment)) is not None
        ]
        return torch.stack(known).sum(0) if len(known) == len(self.points) else None
