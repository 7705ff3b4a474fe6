"""The errors of its own that the package raises."""

from collections.abc import Sequence

__all__ = ["ByzantineBreakdownError", "ByzantineSuspectError", "ReferenceLostError"]


class ByzantineBreakdownError(RuntimeError):
    """More workers are provably bad than ``num_byzantine`` allows, so no rule can vouch for a result.

    Args:
        workers: indices of the workers whose rows are non-finite or too large to measure (a worker is a rank).
        num_workers: number of workers, m.
        num_byzantine: the bound f that they exceed.

    Example:
        >>> raise ByzantineBreakdownError(workers=[0, 2], num_workers=5, num_byzantine=1)
        Traceback (most recent call last):
        ...
        lightning_byzantine.errors.ByzantineBreakdownError: 2 of 5 workers sent a non-finite or overflowing vector \
(ranks 0, 2), but num_byzantine=1

    """

    def __init__(self, workers: Sequence[int], num_workers: int, num_byzantine: int) -> None:
        self.workers = list(workers)
        self.num_workers = num_workers
        self.num_byzantine = num_byzantine
        super().__init__(
            f"{len(self.workers)} of {num_workers} workers sent a non-finite or overflowing vector"
            f" (ranks {', '.join(map(str, self.workers))}), but num_byzantine={num_byzantine}"
        )

    def __reduce__(self) -> tuple[type, tuple[list[int], int, int]]:
        # Lightning's spawn and fork launchers pickle a worker's error to raise it in the parent.
        return type(self), (self.workers, self.num_workers, self.num_byzantine)


class ReferenceLostError(ByzantineBreakdownError):
    """The row of the worker that a rule trusts is non-finite or too large to measure, so that it has nothing to go by.

    Args:
        workers: the index of that worker.
        num_workers: number of workers whose rows are left.
        num_byzantine: how many of those may be Byzantine.

    Example:
        >>> raise ReferenceLostError(workers=[2], num_workers=4, num_byzantine=1)
        Traceback (most recent call last):
        ...
        lightning_byzantine.errors.ReferenceLostError: the trusted worker (rank 2) sent a non-finite or overflowing \
vector

    """

    def __init__(self, workers: Sequence[int], num_workers: int, num_byzantine: int) -> None:
        super().__init__(workers, num_workers, num_byzantine)
        self.args = (f"the trusted worker (rank {self.workers[0]}) sent a non-finite or overflowing vector",)


class ByzantineSuspectError(RuntimeError):
    """A worker is under suspicion, and the run was to end then.

    Args:
        worker: its index.
        evidence: who it is, and what it did.

    Example:
        >>> raise ByzantineSuspectError(worker=3, evidence="worker 3 (rank 3): non-finite in 7 of the last 7 steps")
        Traceback (most recent call last):
        ...
        lightning_byzantine.errors.ByzantineSuspectError: worker 3 (rank 3): non-finite in 7 of the last 7 steps

    """

    def __init__(self, worker: int, evidence: str) -> None:
        self.worker = worker
        self.evidence = evidence
        super().__init__(evidence)

    def __reduce__(self) -> tuple[type, tuple[int, str]]:
        return type(self), (self.worker, self.evidence)
