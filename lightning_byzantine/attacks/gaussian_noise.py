"""Noise instead of an estimate."""

from collections.abc import Sequence

import torch
from torch import Tensor

from lightning_byzantine.attacks.attack import VectorAttack, forge_rows
from lightning_byzantine.matrix import WorkerMatrix
from lightning_byzantine.utilities.checks import check_at_least
from lightning_byzantine.utilities.rng import StepSeed

__all__ = ["GaussianNoise"]


class GaussianNoise(VectorAttack):
    """Each Byzantine worker sends independent N(0, std^2) noise in every coordinate instead of its estimate.

    Coordinates are drawn in DDP's order of the columns, which is another one in the first step of a process; so the
    noise in the first step of a resumed run differs. Each shard of a sharded matrix has noise of its own.

    Args:
        std: standard deviation, in the units of the gradient.
        seed: seed of the noise, which is new in every step and the same on every rank.

    Source: Blanchard et al., "Machine Learning with Adversaries: Byzantine Tolerant Gradient Descent", NeurIPS 2017.

    Example:
        >>> GaussianNoise(std=10.0)(torch.zeros(3, 4), byzantine=[2])[:2]
        tensor([[0., 0., 0., 0.],
                [0., 0., 0., 0.]])

    """

    def __init__(self, std: float = 1.0, seed: int = 0) -> None:
        super().__init__()
        self.std = check_at_least("std", std, 0)
        self.draws = StepSeed(seed)

    def tamper(self, matrix: WorkerMatrix, byzantine: Sequence[int]) -> WorkerMatrix:
        """Return a matrix with noise in the Byzantine rows; one generator serves all blocks of a step."""
        generator = self.draws.next(stream=matrix.shard)

        def forge(honest: Tensor, own: Tensor) -> Tensor:
            # Drawn on the CPU, so that the noise is the same on every device.
            return self.std * torch.randn(own.shape, generator=generator).to(own)

        return forge_rows(matrix, byzantine, forge)
