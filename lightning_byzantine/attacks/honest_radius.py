"""As far from the honest mean as honest workers are, straight against its direction."""

from collections.abc import Sequence

from lightning_byzantine.attacks.attack import VectorAttack
from lightning_byzantine.attacks.honest_statistics import beside_honest_mean, honest_mean, honest_radius, honest_rows
from lightning_byzantine.matrix import WorkerMatrix
from lightning_byzantine.utilities.checks import check_at_least

__all__ = ["HonestRadius"]


class HonestRadius(VectorAttack):
    """All Byzantine workers send mu - factor * r * mu / ||mu||, where mu is the honest mean.

    r is the honest radius, median_i ||x_i - mu|| over honest rows. A rule that drops rows far from a center sees rows
    at the usual distance. Where gradients are mostly noise, r is a multiple of ||mu||, and the forged rows point
    uphill. The mean is sent where mu is 0.

    Args:
        factor: distance from the mean, in radii.

    Example:
        >>> import torch
        >>> HonestRadius()(torch.tensor([[1.0], [2.0], [6.0], [9.0]]), byzantine=[3])
        tensor([[1.],
                [2.],
                [6.],
                [1.]])

    """

    def __init__(self, factor: float = 1.0) -> None:
        super().__init__()
        self.factor = check_at_least("factor", factor, 0)

    def tamper(self, matrix: WorkerMatrix, byzantine: Sequence[int]) -> WorkerMatrix:
        """Return a matrix with forged Byzantine rows, by the honest ones' distances from their mean."""
        honest = honest_rows(matrix, byzantine)
        against = honest_mean(honest).map_blocks(lambda mean: -mean)
        return beside_honest_mean(matrix, byzantine, against, self.factor * honest_radius(honest))
