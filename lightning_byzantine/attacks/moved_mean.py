"""The base class of attacks that move the honest mean as far as stays hidden."""

from abc import abstractmethod
from collections.abc import Callable, Sequence
from typing import Literal

import torch
from torch import Tensor

from lightning_byzantine.attacks.attack import VectorAttack
from lightning_byzantine.attacks.honest_statistics import beside_honest_mean, honest_rows
from lightning_byzantine.matrix import WorkerMatrix
from lightning_byzantine.utilities.checks import check_choice

__all__ = ["MovedMean"]

_PERTURBATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    # The deviation of a single row is NaN.
    "std": lambda honest: -honest.std(dim=0) if len(honest) > 1 else torch.zeros_like(honest[0]),
    "unit": lambda honest: -honest.mean(dim=0),
    "sign": lambda honest: -honest.mean(dim=0).sign(),
}


class MovedMean(VectorAttack):
    """All Byzantine workers send mu + gamma p, where mu is the honest mean and p a direction.

    To write one, override :meth:`distance`, the length of gamma p.

    Args:
        perturbation: p: "std" for -sigma, the standard deviation of the honest rows in each coordinate; "unit" for
            -mu / ||mu||; "sign" for -sign(mu).

    """

    def __init__(self, perturbation: Literal["std", "unit", "sign"] = "std") -> None:
        super().__init__()
        self.perturbation = check_choice("perturbation", perturbation, _PERTURBATIONS)

    @abstractmethod
    def distance(self, honest: WorkerMatrix, direction: WorkerMatrix) -> float:
        """Return how far to move the mean.

        Args:
            honest: the honest rows, in float64.
            direction: p, one row of any length.

        """

    def tamper(self, matrix: WorkerMatrix, byzantine: Sequence[int]) -> WorkerMatrix:
        """Return a matrix with forged Byzantine rows, by the distances between the honest ones."""
        perturbation = _PERTURBATIONS[self.perturbation]
        honest = honest_rows(matrix, byzantine)
        direction = honest.map_blocks(lambda rows: perturbation(rows)[None])
        return beside_honest_mean(matrix, byzantine, direction, self.distance(honest, direction))
