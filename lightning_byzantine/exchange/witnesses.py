"""What all ranks know together about who has lied to whom."""

import warnings
from collections.abc import Callable, Collection

import torch

from lightning_byzantine.exchange.agreed_broadcast import AgreedBroadcast
from lightning_byzantine.exchange.channel import Channel
from lightning_byzantine.exchange.conflicts import Conflicts

__all__ = ["Witnesses"]


class Witnesses:
    """The conflicts between ranks, the same on all honest ones, and how they talk about them.

    To be created on all ranks at once.

    Args:
        max_faulty: how many ranks may be faulty, under half of them.
        device: where the process group's tensors are.
        notice: called with ranks that have just been proved to be faulty, on every rank in the same step.

    Attributes:
        channel: to all other ranks.
        conflicts: of this run.
        broadcast: by which all agree on what each says.

    """

    def __init__(self, max_faulty: int, device: torch.device, notice: Callable[[frozenset[int]], None]) -> None:
        self.channel = Channel(device)
        self.conflicts = Conflicts(self.channel.num_ranks, max_faulty)
        self.broadcast = AgreedBroadcast(self.channel, self.conflicts)
        self._notice = notice
        self._known: frozenset[int] = frozenset()
        self._known_pairs: set[tuple[int, int]] = set()

    @property
    def voters(self) -> list[int]:
        """The ranks that are not proved to be faulty."""
        return self.conflicts.voters

    def exclude(self, ranks: Collection[int]) -> None:
        """Listen no more to ranks that have been proved to be faulty otherwise; to be called on all ranks."""
        self._known |= frozenset(ranks)
        self.conflicts.exclude(ranks)

    def announce(self) -> None:
        """Give notice of those who have been proved to be faulty since the last time, and warn of conflicts."""
        for pair in sorted(self.conflicts.pairs - self._known_pairs):
            if self.conflicts.proved.isdisjoint(pair) and self.channel.rank == 0:
                warnings.warn(
                    f"Ranks {pair[0]} and {pair[1]} contradict each other about what one told the other: one of them is"
                    " faulty, or what is between them. Which one is not known, so from now on, what they send each"
                    " other goes by way of a third rank.",
                    stacklevel=2,
                )
        self._known_pairs = set(self.conflicts.pairs)
        new, self._known = self.conflicts.proved - self._known, self.conflicts.proved
        if new:
            self._notice(new)
