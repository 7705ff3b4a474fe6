"""What attackers measure of the honest rows, over the columns of all ranks."""

from collections.abc import Sequence

from torch import Tensor

from lightning_byzantine.attacks.attack import forge_rows, honest_workers
from lightning_byzantine.matrix import WorkerMatrix
from lightning_byzantine.utilities.medians import known_median

__all__ = ["beside_honest_mean", "honest_distances", "honest_mean", "honest_radius", "honest_rows"]


def honest_rows(matrix: WorkerMatrix, byzantine: Sequence[int]) -> WorkerMatrix:
    """Return the honest workers' rows, in float64."""
    honest = honest_workers(matrix, byzantine)
    return matrix.map_blocks(lambda block: block[honest].double())


def honest_mean(honest: WorkerMatrix) -> WorkerMatrix:
    """Return their mean, a single row."""
    return honest.map_blocks(lambda rows: rows.mean(dim=0, keepdim=True))


def honest_distances(honest: WorkerMatrix) -> Tensor:
    """Return their distances from their mean, [m - f]."""
    return honest.distances([block[0] for block in honest_mean(honest).blocks])


def honest_radius(honest: WorkerMatrix) -> float:
    """Return the median distance of honest rows from their mean; of an even number, the mean of the middle two.

    Example:
        >>> import torch
        >>> honest_radius(WorkerMatrix([torch.tensor([[1.0], [2.0], [6.0]])]))
        2.0

    """
    return known_median(honest_distances(honest).tolist())


def beside_honest_mean(
    matrix: WorkerMatrix, byzantine: Sequence[int], direction: WorkerMatrix, length: float
) -> WorkerMatrix:
    """Return a matrix whose Byzantine rows are all the honest mean, moved by a length along a direction.

    Args:
        matrix: not written to.
        byzantine: the rows to replace.
        direction: one row of any length; where it is 0, the mean stays where it is.
        length: how far to move.

    """
    norm = direction.squared_norms().sqrt().item()
    factor = length / norm if norm > 0 else 0.0
    parts = iter(direction.blocks)
    return forge_rows(
        matrix, byzantine, lambda honest, own: (honest.mean(dim=0) + factor * next(parts)[0]).expand_as(own)
    )
