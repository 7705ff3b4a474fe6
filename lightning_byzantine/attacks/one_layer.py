"""All of the deviation in a single layer."""

from collections.abc import Sequence

import torch
from torch import Tensor

from lightning_byzantine.attacks.attack import VectorAttack
from lightning_byzantine.attacks.honest_statistics import beside_honest_mean, honest_radius, honest_rows
from lightning_byzantine.matrix import WorkerMatrix
from lightning_byzantine.utilities.checks import check_at_least, check_integer_at_least

__all__ = ["OneLayer"]

# Fewer elements are those of a bias or a normalization, which do little harm.
_LEAST = 100


class OneLayer(VectorAttack):
    """All Byzantine workers send the honest mean, moved in one parameter tensor only, in the same way in every step.

    ::

        mu - budget * r * s / ||s||     r = median_i ||x_i - mu||, over honest rows and the whole vector

    where s is sigma, the standard deviation (ddof 1) of each column's honest rows, in the columns of this tensor, and
    0 elsewhere. A rule that looks at distances between whole vectors sees rows that are not farther away than honest
    ones; in the tensor itself, they are farther by a factor of sqrt(d / n) if it has n of d columns.

    Args:
        layer: name of the parameter, as in ``model.named_parameters()``. None for the last one with 100 elements or
            more, which is the weight of a classifier's last layer; on plain tensors, all columns belong to it.
        budget: length of the deviation, in honest ones.
        num_classes: K, to move only the first 1 / K of the tensor. In a last weight [K, features], that is what leads
            to the first class, which wins all images. None to move the whole tensor.

    Raises:
        ValueError: when attacking, if there is no such parameter.

    Example:
        >>> vectors = torch.tensor([[0.0, 0.0], [6.0, 8.0], [9.0, 9.0]])
        >>> OneLayer(budget=2.0)(vectors, byzantine=[2])[2]
        tensor([-3., -4.])
        >>> OneLayer(budget=2.0, num_classes=2)(vectors, byzantine=[2])[2]
        tensor([-7.,  4.])

    """

    def __init__(self, layer: str | None = None, budget: float = 1.4, num_classes: int | None = None) -> None:
        super().__init__()
        if layer is not None and not isinstance(layer, str):
            raise TypeError(f"layer must be the name of a parameter, got {layer!r}")
        self.layer = layer
        self.budget = check_at_least("budget", budget, 0)
        self.num_classes = None if num_classes is None else check_integer_at_least("num_classes", num_classes, 2)

    def tamper(self, matrix: WorkerMatrix, byzantine: Sequence[int]) -> WorkerMatrix:
        """Return a matrix with forged Byzantine rows, by the honest ones' distances from their mean."""
        honest = honest_rows(matrix, byzantine)
        columns = self._attacked_columns(honest)
        parts = iter(columns)

        def direction(rows: Tensor) -> Tensor:
            # The deviation of a single row is NaN.
            deviation = rows.std(dim=0) if len(rows) > 1 else torch.zeros_like(rows[0])
            moved = torch.zeros_like(deviation)
            for part in next(parts):
                moved[part] = -deviation[part]
            return moved[None]

        length = self.budget * honest_radius(honest)
        return beside_honest_mean(matrix, byzantine, honest.map_blocks(direction), length)

    def _attacked_columns(self, matrix: WorkerMatrix) -> list[list[slice]]:
        """Return which columns of each block to move."""
        columns = self._columns(matrix)
        if self.num_classes is None:
            return columns
        here = sum(part.stop - part.start for block in columns for part in block)
        before, whole = _on_other_ranks(matrix, here)
        left = max(0, whole // self.num_classes - before)
        attacked = []
        for block in columns:
            attacked.append([slice(part.start, min(part.stop, part.start + left)) for part in block])
            left = max(0, left - sum(part.stop - part.start for part in block))
        return attacked

    def _columns(self, matrix: WorkerMatrix) -> list[list[slice]]:
        """Return which columns of each block belong to the tensor."""
        segments = matrix.segments
        if segments is None:
            if self.layer is not None:
                raise ValueError(f"layer must be None for a matrix without names of parameters, got {self.layer!r}")
            return [[slice(0, block.shape[1])] for block in matrix.blocks]
        if self.layer is None:
            large = [index for index, size in enumerate(segments.sizes) if size >= _LEAST]
            attacked = set(large[-1:] or range(len(segments.sizes)))
        elif self.layer in segments.names:
            attacked = {segments.names.index(self.layer)}
        else:
            raise ValueError(f"layer must be one of {', '.join(segments.names)}, got {self.layer!r}")
        return [[part for index, part in block if index in attacked] for block in segments.columns]


def _on_other_ranks(matrix: WorkerMatrix, here: int) -> tuple[int, int]:
    """Return how many of the tensor's columns are on lower ranks, and on all, if ``here`` are on this one."""

    def over_ranks(column: Tensor) -> Tensor:
        return matrix.with_blocks([column.sqrt()[:, None]]).squared_norms()

    num_ranks = round(over_ranks(torch.ones(1, dtype=torch.float64)).item())
    own = torch.zeros(num_ranks, dtype=torch.float64)
    own[matrix.shard] = here
    counts = over_ranks(own).round().long()
    return int(counts[: matrix.shard].sum()), int(counts.sum())
