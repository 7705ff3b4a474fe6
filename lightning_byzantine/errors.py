"""The errors of its own that the package raises."""

from collections.abc import Sequence

__all__ = ["ByzantineBreakdownError", "ByzantineSuspectError"]


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
