"""Honest workers made to look like the outliers, before the attack."""

from collections.abc import Sequence

import torch

from lightning_byzantine.aggregators.aggregator import Aggregator
from lightning_byzantine.attacks.attack import Attack, VectorAttack, forge_rows
from lightning_byzantine.matrix import WorkerMatrix
from lightning_byzantine.utilities.checks import check_integer_at_least, check_probability

__all__ = ["Framing"]


class Framing(VectorAttack):
    """All Byzantine workers crowd around one honest worker for some steps; then they run another attack.

    ::

        worker i sends (1 - distance) x_v + distance x_i      x_i: its own estimate, x_v: that of the honest worker

    of lowest index. With it, f = (m - 1) / 2 workers are the majority. Its rows are much nearer to each other than
    honest ones are, so that all other honest workers deviate from it in every step. A rule that remembers who deviates,
    and leaves out no more than f workers, has then none to leave out when the attack begins.

    Args:
        attack: what they do afterwards; an attack on vectors.
        start: number of steps before it.
        distance: of a row from x_v, in that of the worker's own estimate from it.

    Example:
        >>> from lightning_byzantine.attacks import SignFlip
        >>> attack, vectors = Framing(SignFlip(), start=1), torch.tensor([[1.0], [3.0], [6.0]])
        >>> [attack(vectors, byzantine=[2])[2].item() for _ in range(2)]
        [2.0, -6.0]

    """

    def __init__(self, attack: Attack, start: int = 150, distance: float = 0.2) -> None:
        super().__init__()
        if not isinstance(attack, Attack) or not attack.on_vectors:
            raise TypeError(f"attack must be an Attack on vectors, such as SignFlip(), got {attack!r}")
        self.attack = attack
        self.start = check_integer_at_least("start", start, 0)
        self.distance = check_probability("distance", distance)
        # Not a buffer: Lightning's spawn launcher moves buffers to shared memory, where all ranks would count in one.
        self._calls = 0

    def check(self, num_workers: int, byzantine: Sequence[int]) -> None:
        """Raise :class:`ValueError` if these workers can't run the attack."""
        self.attack.check(num_workers, byzantine)

    def bind(self, aggregator: Aggregator, num_byzantine: int) -> None:
        """Pass the rule in use on to the attack."""
        self.attack.bind(aggregator, num_byzantine)

    def tamper(self, matrix: WorkerMatrix, byzantine: Sequence[int]) -> WorkerMatrix:
        """Return a matrix whose Byzantine rows are in the crowd, or as the attack leaves them."""
        self._calls += 1
        if self._calls > self.start:
            return self.attack.tamper(matrix, byzantine)
        return forge_rows(
            matrix, byzantine, lambda honest, own: torch.lerp(honest[0].expand_as(own), own, self.distance)
        )

    def get_extra_state(self) -> int:
        """Return the number of calls so far."""
        return self._calls

    def set_extra_state(self, state: int) -> None:
        """Restore the number of calls."""
        self._calls = state
