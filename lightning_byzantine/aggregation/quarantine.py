"""Workers whose vectors are always dropped."""

from collections.abc import Collection, Iterable, Iterator
from contextlib import contextmanager

import torch

from lightning_byzantine.aggregators import Aggregator
from lightning_byzantine.errors import EquivocationError
from lightning_byzantine.matrix import WorkerMatrix
from lightning_byzantine.utilities.checks import check_worker_indices

__all__ = ["Quarantine", "rank_errors"]


class Quarantine:
    """The workers whose rows are dropped in every step.

    A worker that is expelled by proof was one of the f Byzantine ones; without proof it may have been an honest one,
    framed by those who remain::

        f' = min(max(0, f - p), ceil(n / 2) - 1)        p: workers expelled by proof; n: remaining workers

    so that a wrong expulsion does not make the remaining workers trust each other more than they have to: f' is as
    large as n allows.

    Attributes:
        workers: indices of all of them.
        proved: indices of those expelled by proof.

    Example:
        >>> from lightning_byzantine.aggregators import CoordinateWiseMedian
        >>> framed, found = Quarantine(), Quarantine()
        >>> framed.add([0, 1], CoordinateWiseMedian(), num_workers=9, num_byzantine=3)
        >>> found.add([0, 1], CoordinateWiseMedian(), num_workers=9, num_byzantine=3, proved=True)
        >>> framed.remaining_byzantine(num_workers=9, num_byzantine=3), found.remaining_byzantine(9, 3)
        (3, 1)

    """

    def __init__(self) -> None:
        self.workers: frozenset[int] = frozenset()
        self.proved: frozenset[int] = frozenset()

    def add(
        self,
        workers: Iterable[int],
        aggregator: Aggregator,
        num_workers: int,
        num_byzantine: int,
        *,
        proved: bool = False,
    ) -> None:
        """Put more workers into quarantine.

        Args:
            workers: indices. For those in quarantine without proof, there may be proof now.
            aggregator: the rule, which must support the remaining workers.
            num_workers: m, including workers in quarantine.
            num_byzantine: f, including workers in quarantine.
            proved: whether there is proof that all of them are faulty.

        Raises:
            ValueError: if the indices are wrong, or the rule does not support the remaining workers. The quarantine is
                then unchanged.

        """
        workers = frozenset(workers)
        together = self.workers | workers
        check_worker_indices("workers", together, num_workers)
        by_proof = self.proved | workers if proved else self.proved
        remaining = num_workers - len(together)
        aggregator.check(remaining, _remaining_byzantine(remaining, num_byzantine - len(by_proof)))
        self.workers, self.proved = together, by_proof

    def remaining_byzantine(self, num_workers: int, num_byzantine: int) -> int:
        """Return how many of the workers outside may be Byzantine, f', if f of all m may be."""
        return _remaining_byzantine(num_workers - len(self.workers), num_byzantine - len(self.proved))

    def without(self, matrix: WorkerMatrix) -> WorkerMatrix:
        """Return the rows of all other workers."""
        if not self.workers:
            return matrix
        return matrix.select(torch.tensor([row for row in range(matrix.num_workers) if row not in self.workers]))


@contextmanager
def rank_errors(ranks: Collection[int]) -> Iterator[None]:
    """Raise an error that names the ranks if the rule can't do without those that are expelled within the block.

    Raises:
        EquivocationError: instead of a ValueError.

    """
    try:
        yield
    except ValueError as error:
        raise EquivocationError(
            sorted(ranks), f"told others different things, and can't be left out: {error}"
        ) from error


def _remaining_byzantine(num_workers: int, num_byzantine: int) -> int:
    return min(max(0, num_byzantine), max(0, num_workers - 1) // 2)
