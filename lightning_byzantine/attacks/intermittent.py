"""Honest most of the time."""

from collections.abc import Sequence
from typing import Any

from lightning_byzantine.aggregators.aggregator import Aggregator
from lightning_byzantine.attacks.attack import Attack
from lightning_byzantine.matrix import WorkerMatrix
from lightning_byzantine.utilities.checks import check_probability
from lightning_byzantine.utilities.rng import StepSeed

__all__ = ["Intermittent"]


class Intermittent(Attack):
    """Another attack in some steps, drawn at random; in all others the Byzantine workers are honest.

    All Byzantine workers attack in the same steps. For an attack on data, each batch is drawn for instead. What the
    attack keeps goes on in the steps in which it is called only: ``StaleGradient`` counts those.

    Args:
        attack: what the Byzantine workers do in the steps that are attacked; an attack on vectors or on data.
        probability: of a step to be attacked.
        seed: seed of the draws, which are the same on every rank.

    Example:
        >>> import torch
        >>> from lightning_byzantine.attacks import SignFlip
        >>> attack = Intermittent(SignFlip(), probability=0.5)
        >>> [attack(torch.tensor([[1.0], [2.0]]), byzantine=[0])[0].item() for _ in range(6)]
        [-1.0, -1.0, 1.0, -1.0, -1.0, -1.0]

    """

    def __init__(self, attack: Attack, probability: float, seed: int = 0) -> None:
        super().__init__()
        if not isinstance(attack, Attack):
            raise TypeError(f"attack must be an Attack, such as SignFlip(), got {attack!r}")
        check_probability("probability", probability)
        self.attack = attack
        self.probability = probability
        self.draws = StepSeed(seed)
        self.on_vectors = attack.on_vectors
        self.on_data = attack.on_data

    def extra_repr(self) -> str:
        """Show the argument in ``repr``."""
        return f"probability={self.probability}"

    def check(self, num_workers: int, byzantine: Sequence[int]) -> None:
        """Raise :class:`ValueError` when the attack can't be run by these workers."""
        self.attack.check(num_workers, byzantine)

    def bind(self, aggregator: Aggregator, num_byzantine: int) -> None:
        """Tell the attack which rule is in use."""
        self.attack.bind(aggregator, num_byzantine)

    def tamper(self, matrix: WorkerMatrix, byzantine: Sequence[int]) -> WorkerMatrix:
        """Return what the attack makes of the matrix, or the matrix itself."""
        return self.attack.tamper(matrix, byzantine) if self.draws.happens(self.probability) else matrix

    def poison(self, batch: Any) -> Any:
        """Return what the attack makes of the batch, or the batch itself."""
        return self.attack.poison(batch) if self.draws.happens(self.probability) else batch
