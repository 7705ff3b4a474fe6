"""The errors of its own that the package raises."""

from collections.abc import Sequence

__all__ = ["ByzantineBreakdownError", "InconsistentRanksError", "WorkerLostError"]


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


class WorkerLostError(RuntimeError):
    """A collective failed, and some ranks are missing from it: nobody can go on without them.

    Args:
        ranks: those that are missing; empty if nobody can tell.
        reason: what is known of them.

    Example:
        >>> raise WorkerLostError(ranks=[2], reason="no sign of life for 3 s")
        Traceback (most recent call last):
        ...
        lightning_byzantine.errors.WorkerLostError: Lost rank 2: no sign of life for 3 s

    """

    def __init__(self, ranks: Sequence[int], reason: str) -> None:
        self.ranks = list(ranks)
        self.reason = reason
        super().__init__(f"Lost {_named(self.ranks)}: {reason}")

    def __reduce__(self) -> tuple[type, tuple[list[int], str]]:
        return type(self), (self.ranks, self.reason)


class InconsistentRanksError(RuntimeError):
    """Ranks hold different parameters or optimizer states, though all apply the same updates to the same start.

    Args:
        ranks: those that differ from the majority; empty if there is none.
        num_ranks: number of ranks.
        step: number of optimizer steps taken.

    Example:
        >>> raise InconsistentRanksError(ranks=[1], num_ranks=3, step=100)
        Traceback (most recent call last):
        ...
        lightning_byzantine.errors.InconsistentRanksError: After 100 optimizer steps, the parameters or the optimizer \
state of rank 1 differ from those of the other 2

    """

    def __init__(self, ranks: Sequence[int], num_ranks: int, step: int) -> None:
        self.ranks = list(ranks)
        self.num_ranks = num_ranks
        self.step = step
        found = (
            f"of {_named(self.ranks)} differ from those of the other {num_ranks - len(self.ranks)}"
            if self.ranks
            else f"differ, and no state is that of most of the {num_ranks} ranks"
        )
        super().__init__(f"After {step} optimizer steps, the parameters or the optimizer state {found}")

    def __reduce__(self) -> tuple[type, tuple[list[int], int, int]]:
        return type(self), (self.ranks, self.num_ranks, self.step)


def _named(ranks: list[int]) -> str:
    if not ranks:
        return "contact"
    return f"rank{'s' if len(ranks) > 1 else ''} {', '.join(map(str, ranks))}"
