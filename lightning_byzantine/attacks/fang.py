"""Values beyond the far end of what honest workers send."""

from collections.abc import Sequence

import torch
from torch import Tensor

from lightning_byzantine.attacks.attack import VectorAttack, forge_rows
from lightning_byzantine.matrix import WorkerMatrix
from lightning_byzantine.utilities.rng import StepSeed

__all__ = ["Fang"]


class Fang(VectorAttack):
    """Each Byzantine worker sends, in each coordinate, a value beyond the honest ones, against their mean.

    ::

        mean > 0:  low  / r if low  > 0 else low  * r     low, high: the smallest and largest honest value
        mean < 0:  high * r if high > 0 else high / r     r: drawn from [1, 2] for each value
        mean = 0:  0

    This is the attack with full knowledge that the paper tailors to the trimmed mean and the median. If a rule drops
    these values, it drops as many honest ones at the other end.

    Args:
        seed: seed of the draws, which are new in every step and the same on every rank. As with
            :class:`~lightning_byzantine.attacks.GaussianNoise`, values are drawn in DDP's order of the columns, and
            each shard of a sharded matrix has draws of its own.

    Source: Fang et al., "Local Model Poisoning Attacks to Byzantine-Robust Federated Learning", USENIX Security 2020,
    section 4.3.

    Example:
        >>> forged = Fang()(torch.tensor([[1.0], [2.0], [3.0], [9.0]]), byzantine=[3])[3].item()
        >>> 0.5 <= forged <= 1.0
        True

    """

    def __init__(self, seed: int = 0) -> None:
        super().__init__()
        self.draws = StepSeed(seed)

    def tamper(self, matrix: WorkerMatrix, byzantine: Sequence[int]) -> WorkerMatrix:
        """Return a matrix with extreme values in the Byzantine rows; one generator serves all blocks of a step."""
        generator = self.draws.next(stream=matrix.shard)

        def forge(honest: Tensor, own: Tensor) -> Tensor:
            # Drawn on the CPU, so that the values are the same on every device.
            factors = 1 + torch.rand(own.shape, generator=generator).to(own)
            signs = honest.mean(dim=0).sign()
            extremes = torch.where(signs > 0, honest.amin(dim=0), honest.amax(dim=0))
            beyond = torch.where(signs * extremes > 0, extremes / factors, extremes * factors)
            return torch.where(signs == 0, 0.0, beyond)

        return forge_rows(matrix, byzantine, forge)
