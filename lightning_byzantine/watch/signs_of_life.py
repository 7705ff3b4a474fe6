"""Which ranks are silent, late or at their end, by what they have stated."""

import time
from collections.abc import Sequence

from lightning_byzantine.watch.whereabouts import Whereabouts

__all__ = ["SignsOfLife"]


class SignsOfLife:
    """Where each rank is, as last read, and when its heartbeat was last seen to change.

    Args:
        rank: this rank, which is none of the others.
        num_ranks: number of ranks.
        patience: how long a rank's heartbeat may stay the same, in seconds.

    Attributes:
        ranks: where each rank is.
        read_at: when that was read, by the monotonic clock, in seconds.

    Example:
        >>> signs = SignsOfLife(rank=0, num_ranks=2, patience=3)
        >>> signs.update([Whereabouts(beats=1), Whereabouts(beats=1, has_ended=True)])
        >>> signs.silent(), signs.have_ended()
        ([], True)

    """

    def __init__(self, rank: int, num_ranks: int, patience: float) -> None:
        self.ranks: Sequence[Whereabouts] = [Whereabouts() for _ in range(num_ranks)]
        self._others = [other for other in range(num_ranks) if other != rank]
        self._patience = patience
        self.read_at = time.monotonic()
        self._changed_at = [self.read_at] * num_ranks

    def update(self, ranks: Sequence[Whereabouts]) -> None:
        """Take what was read just now."""
        self.read_at = time.monotonic()
        for rank, (before, after) in enumerate(zip(self.ranks, ranks, strict=True)):
            if before.beats != after.beats:
                self._changed_at[rank] = self.read_at
        self.ranks = ranks

    def silent(self) -> list[int]:
        """Return the other ranks whose heartbeat had not changed for too long when it was last read."""
        # Not until now, since nothing is read as long as nothing is unusual.
        return [rank for rank in self._others if self.read_at - self._changed_at[rank] > self._patience]

    def have_ended(self) -> bool:
        """Return whether all other ranks have left the run or are silent."""
        silent = self.silent()
        return all(self.ranks[rank].has_ended or rank in silent for rank in self._others)

    def late(self, entered: int) -> list[int]:
        """Return the other ranks that have not entered as many collectives, and are not waiting in one."""
        return [rank for rank in self._others if self.ranks[rank].entered < entered and not self.ranks[rank].waits]

    def ports_of_others(self) -> set[int]:
        """Return the local ports of all connections of the other ranks."""
        return {port for rank in self._others for port in self.ranks[rank].ports}

    def last_places(self) -> list[str]:
        """Return the collective that each rank has entered last."""
        return [state.places[-1] if state.places else "no collective yet" for state in self.ranks]
