"""One side in one step, the other side in the next."""

from collections.abc import Sequence

from torch import Tensor

from lightning_byzantine.attacks.attack import VectorAttack, forge_rows
from lightning_byzantine.attacks.honest_statistics import honest_rows
from lightning_byzantine.matrix import WorkerMatrix
from lightning_byzantine.utilities.checks import check_at_least

__all__ = ["Alternating"]


class Alternating(VectorAttack):
    """All Byzantine workers send mu + factor * (x_a - x_b) in one step and mu - factor * (x_a - x_b) in the next.

    mu is the honest mean; x_a and x_b, a < b, are the two honest rows that are farthest apart. The colluders are on the
    side of x_a and then on that of x_b, and a rule that selects rows selects others in every step. Where the aggregate
    of momenta is undone by (v_t - beta v_{t-1}) / (1 - beta), the optimizer receives each such change 1 / (1 - beta)
    times.

    Args:
        factor: distance from the mean, in those of the two rows from each other; 0.5 is about where they are
            themselves.

    Example:
        >>> import torch
        >>> attack = Alternating(factor=0.5)
        >>> [attack(torch.tensor([[1.0], [3.0], [5.0], [9.0]]), byzantine=[3])[3].item() for _ in range(3)]
        [1.0, 5.0, 1.0]

    """

    def __init__(self, factor: float = 1.0) -> None:
        super().__init__()
        self.factor = check_at_least("factor", factor, 0)
        # Not a buffer: Lightning's spawn launcher moves buffers to shared memory, where all ranks would count in one.
        self._calls = 0

    def tamper(self, matrix: WorkerMatrix, byzantine: Sequence[int]) -> WorkerMatrix:
        """Return a matrix with forged Byzantine rows, and change sides."""
        squared = honest_rows(matrix, byzantine).squared_distances()
        first, second = divmod(int(squared.argmax()), len(squared))
        factor = self.factor if self._calls % 2 == 0 else -self.factor
        self._calls += 1

        def forge(honest: Tensor, own: Tensor) -> Tensor:
            return (honest.mean(dim=0) + factor * (honest[first] - honest[second])).expand_as(own)

        return forge_rows(matrix, byzantine, forge)

    def get_extra_state(self) -> int:
        """Return the number of calls so far."""
        return self._calls

    def set_extra_state(self, state: int) -> None:
        """Restore the number of calls."""
        self._calls = state
