"""Workers whose vectors are always dropped."""

from collections.abc import Iterable

import torch

from lightning_byzantine.aggregators import Aggregator
from lightning_byzantine.matrix import WorkerMatrix
from lightning_byzantine.utilities.checks import check_worker_indices

__all__ = ["Quarantine"]


class Quarantine:
    """The workers whose rows are dropped in every step.

    Attributes:
        workers: their indices.

    """

    def __init__(self) -> None:
        self.workers: frozenset[int] = frozenset()

    def add(self, workers: Iterable[int], aggregator: Aggregator, num_workers: int, num_byzantine: int) -> None:
        """Put more workers into quarantine.

        Args:
            workers: indices.
            aggregator: the rule, which must support the remaining workers.
            num_workers: m, including workers in quarantine.
            num_byzantine: f, which is reduced by one for each worker in quarantine.

        Raises:
            ValueError: if the indices are wrong, or the rule does not support the remaining workers.

        """
        together = self.workers | set(workers)
        check_worker_indices("workers", together, num_workers)
        aggregator.check(num_workers - len(together), max(0, num_byzantine - len(together)))
        self.workers = frozenset(together)

    def without(self, matrix: WorkerMatrix) -> WorkerMatrix:
        """Return the rows of all other workers."""
        if not self.workers:
            return matrix
        return matrix.select(torch.tensor([row for row in range(matrix.num_workers) if row not in self.workers]))
