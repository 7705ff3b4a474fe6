"""Pure noise."""

from collections.abc import Sequence

import torch
from torch import Tensor

from lightning_byzantine.attacks.attack import VectorAttack
from lightning_byzantine.matrix import WorkerMatrix
from lightning_byzantine.utilities.checks import check_at_least
from lightning_byzantine.utilities.rng import StepSeed

__all__ = ["GaussianNoise"]


class GaussianNoise(VectorAttack):
    """Each Byzantine worker sends independent N(0, std^2) noise in every coordinate instead of its estimate.

    Coordinates are drawn in the order in which DDP keeps them, which differs between the first step of a process and
    the others; so a resumed run sees other noise in its first step. Each shard of a sharded matrix has its own noise.

    Args:
        std: standard deviation, in the units of the gradient.
        seed: seed of the noise, which is new at every step and the same on every rank.

    Source: Blanchard et al., "Machine Learning with Adversaries: Byzantine Tolerant Gradient Descent", NeurIPS 2017.

    Example:
        >>> GaussianNoise(std=10.0)(torch.zeros(3, 4), byzantine=[2])[:2]
        tensor([[0., 0., 0., 0.],
                [0., 0., 0., 0.]])

    """

    def __init__(self, std: float = 1.0, seed: int = 0) -> None:
        super().__init__()
        check_at_least("std", std, 0)
        self.std = std
        self.draws = StepSeed(seed)
        self._generator = torch.Generator()

    def extra_repr(self) -> str:
        """Show the argument in ``repr``."""
        return f"std={self.std}"

    def tamper(self, matrix: WorkerMatrix, byzantine: Sequence[int]) -> WorkerMatrix:
        """Return a matrix with noise in the Byzantine rows, from one draw for all blocks of a step."""
        self._generator = self.draws.next(stream=matrix.shard)
        return super().tamper(matrix, byzantine)

    def forge(self, honest: Tensor, own: Tensor) -> Tensor:
        """Return noise, drawn on the CPU so that every device gets the same."""
        return self.std * torch.randn(own.shape, generator=self._generator).to(own)
