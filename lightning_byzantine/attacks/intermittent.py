"""An attack in some steps only."""

from collections.abc import Sequence
from typing import Any

from lightning_byzantine.aggregators.aggregator import Aggregator
from lightning_byzantine.attacks.attack import Attack
from lightning_byzantine.matrix import WorkerMatrix
from lightning_byzantine.utilities.checks import check_integer_at_least, check_probability
from lightning_byzantine.utilities.rng import StepSeed

__all__ = ["Intermittent"]


class Intermittent(Attack):
    """Runs another attack in randomly drawn steps, or from some step on; in all others the workers are honest.

    All Byzantine workers attack in the same steps. For an attack on data, there is a draw for each batch instead, and
    ``start`` counts batches of a process. The state of the attack advances only when it is called: the ``delay`` of
    ``StaleGradient`` counts attacked steps.

    Args:
        attack: what the Byzantine workers do in the attacked steps; an attack on vectors or on data.
        probability: probability that a step is attacked.
        seed: seed of the draws, which are the same on every rank.
        start: number of steps before the first that may be attacked. With ``probability=1``, workers are honest as long
            as it takes to be trusted, and then attack in every step.

    Example:
        >>> import torch
        >>> from lightning_byzantine.attacks import SignFlip
        >>> attack = Intermittent(SignFlip(), probability=0.5)
        >>> [attack(torch.tensor([[1.0], [2.0]]), byzantine=[0])[0].item() for _ in range(6)]
        [-1.0, -1.0, 1.0, -1.0, -1.0, -1.0]
        >>> attack = Intermittent(SignFlip(), start=2)
        >>> [attack(torch.tensor([[1.0], [2.0]]), byzantine=[0])[0].item() for _ in range(4)]
        [1.0, 1.0, -1.0, -1.0]

    """

    def __init__(self, attack: Attack, probability: float = 1.0, seed: int = 0, start: int = 0) -> None:
        super().__init__()
        if not isinstance(attack, Attack):
            raise TypeError(f"attack must be an Attack, such as SignFlip(), got {attack!r}")
        self.attack = attack
        self.probability = check_probability("probability", probability)
        self.start = check_integer_at_least("start", start, 0)
        self.draws = StepSeed(seed)
        self.on_vectors = attack.on_vectors
        self.on_data = attack.on_data

    def check(self, num_workers: int, byzantine: Sequence[int]) -> None:
        """Raise :class:`ValueError` if these workers can't run the attack."""
        self.attack.check(num_workers, byzantine)

    def bind(self, aggregator: Aggregator, num_byzantine: int) -> None:
        """Pass the rule in use on to the attack."""
        self.attack.bind(aggregator, num_byzantine)

    def tamper(self, matrix: WorkerMatrix, byzantine: Sequence[int]) -> WorkerMatrix:
        """Return the matrix as the attack leaves it in an attacked step, otherwise the matrix itself."""
        return self.attack.tamper(matrix, byzantine) if self._attacks() else matrix

    def poison(self, batch: Any) -> Any:
        """Return the poisoned batch if it is attacked, otherwise the batch itself."""
        return self.attack.poison(batch) if self._attacks() else batch

    def _attacks(self) -> bool:
        """Tell whether this step is attacked; every step has a draw, so that draws don't depend on ``start``."""
        step = self.draws.get_extra_state()
        return self.draws.happens(self.probability) and step >= self.start
