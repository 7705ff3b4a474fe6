"""Exceptions that are specific to this package."""

from collections.abc import Sequence
from typing import Any

__all__ = [
    "ByzantineBreakdownError",
    "ByzantineSuspectError",
    "DesynchronizedRanksError",
    "EquivocationError",
    "InconsistentRanksError",
    "ReferenceLostError",
    "WorkerLostError",
]


class _PicklableError(RuntimeError):
    """An error whose constructor makes a message of its arguments."""

    def __reduce__(self) -> tuple[Any, ...]:
        # Lightning's spawn and fork launchers pickle a worker's error to raise it in the parent. By default, the
        # constructor would get the message there.
        return type(self).__new__, (type(self), *self.args), vars(self)


class ByzantineBreakdownError(_PicklableError):
    """More than ``num_byzantine`` workers sent unusable vectors, so no rule can guarantee its result.

    Args:
        workers: indices of the workers whose rows are non-finite or too large to measure.
        num_workers: number of workers, m.
        num_byzantine: the bound f that they exceed.

    Example:
        >>> raise ByzantineBreakdownError(workers=[0, 2], num_workers=5, num_byzantine=1)
        Traceback (most recent call last):
        ...
        lightning_byzantine.errors.ByzantineBreakdownError: 2 of 5 workers sent a non-finite or overflowing vector \
(workers 0, 2), but num_byzantine=1

    """

    def __init__(self, workers: Sequence[int], num_workers: int, num_byzantine: int) -> None:
        self.workers = list(workers)
        self.num_workers = num_workers
        self.num_byzantine = num_byzantine
        super().__init__(
            f"{len(self.workers)} of {num_workers} workers sent a non-finite or overflowing vector"
            f" (workers {', '.join(map(str, self.workers))}), but num_byzantine={num_byzantine}"
        )


class ReferenceLostError(ByzantineBreakdownError):
    """The row of a rule's trusted worker is non-finite or too large to measure, so the rule has no result.

    Args:
        workers: the index of that worker.
        num_workers: number of workers whose rows are left.
        num_byzantine: how many of those may be Byzantine.

    Example:
        >>> raise ReferenceLostError(workers=[2], num_workers=4, num_byzantine=1)
        Traceback (most recent call last):
        ...
        lightning_byzantine.errors.ReferenceLostError: the trusted worker 2 sent a non-finite or overflowing vector

    """

    def __init__(self, workers: Sequence[int], num_workers: int, num_byzantine: int) -> None:
        super().__init__(workers, num_workers, num_byzantine)
        self.args = (f"the trusted worker {self.workers[0]} sent a non-finite or overflowing vector",)


class ByzantineSuspectError(_PicklableError):
    """A worker is proved to be faulty, and ``ByzantineMonitor(on_suspect="raise")`` ends the run.

    With ``punish_without_proof=True``, also when it is under suspicion only.

    Args:
        worker: its index.
        evidence: the worker, where it runs, and what was found.

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


class WorkerLostError(_PicklableError):
    """A collective failed because ranks are missing, so the run can't continue.

    Args:
        ranks: the missing ranks; empty if they are not known.
        reason: what is known about them.

    Example:
        >>> raise WorkerLostError(ranks=[2], reason="no sign of life for 3 s")
        Traceback (most recent call last):
        ...
        lightning_byzantine.errors.WorkerLostError: Lost rank 2: no sign of life for 3 s

    """

    def __init__(self, ranks: Sequence[int], reason: str) -> None:
        self.ranks = list(ranks)
        self.reason = reason
        super().__init__(f"Lost {ranks_in_words(self.ranks)}: {reason}")


class DesynchronizedRanksError(_PicklableError):
    """Ranks are in different collectives, so they wait for ever, or take what was sent for something else.

    Args:
        places: for each rank, the collective in which it is, or was when they first differed.

    Attributes:
        ranks: those that are not where most are; empty if there is no majority.

    Example:
        >>> raise DesynchronizedRanksError(["the end of the run", "the end of the run", "the backward pass of batch 6"])
        Traceback (most recent call last):
        ...
        lightning_byzantine.errors.DesynchronizedRanksError: Ranks are in different collectives: rank 2 in \
the backward pass of batch 6; ranks 0, 1 in the end of the run. Do all ranks have the same number of batches, and log \
with sync_dist=True in the same steps?

    """

    def __init__(self, places: Sequence[str]) -> None:
        self.places = list(places)
        by_place: dict[str, list[int]] = {}
        for rank, place in enumerate(self.places):
            by_place.setdefault(place, []).append(rank)
        fewest_first = sorted(by_place, key=lambda place: len(by_place[place]))
        has_majority = 2 * len(by_place[fewest_first[-1]]) > len(self.places)
        self.ranks = sorted(rank for place in fewest_first[:-1] for rank in by_place[place]) if has_majority else []
        where = "; ".join(f"{ranks_in_words(by_place[place])} in {place}" for place in fewest_first)
        super().__init__(
            f"Ranks are in different collectives: {where}. Do all ranks have the same number of batches, and"
            " log with sync_dist=True in the same steps?"
        )


class EquivocationError(_PicklableError):
    """Ranks told others different things, or computed different things from the same, and can't just be left out.

    Args:
        ranks: those of which it is known.
        problem: what they did, and why it ends the run.

    Example:
        >>> raise EquivocationError(ranks=[1], problem="sent another public key to each rank")
        Traceback (most recent call last):
        ...
        lightning_byzantine.errors.EquivocationError: rank 1 sent another public key to each rank

    """

    def __init__(self, ranks: Sequence[int], problem: str) -> None:
        self.ranks = list(ranks)
        super().__init__(f"{ranks_in_words(self.ranks)} {problem}")


class InconsistentRanksError(_PicklableError):
    """Ranks have different parameters or optimizer states, although all of them apply the same updates.

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
            f"of {ranks_in_words(self.ranks)} differ from those of the other {num_ranks - len(self.ranks)}"
            if self.ranks
            else f"differ, and no majority of the {num_ranks} ranks agrees"
        )
        super().__init__(f"After {step} optimizer steps, the parameters or the optimizer state {found}")


def ranks_in_words(ranks: list[int]) -> str:
    """Return "rank 1", "ranks 1, 2", or "contact" for none."""
    if not ranks:
        return "contact"
    return f"rank{'s' if len(ranks) > 1 else ''} {', '.join(map(str, ranks))}"
