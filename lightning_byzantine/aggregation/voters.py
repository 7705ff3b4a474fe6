"""The ranks that vote, on buffers for example."""

from collections.abc import Sequence

import torch.distributed as dist
from torch import Tensor

from lightning_byzantine.aggregation.observers import Observers
from lightning_byzantine.exchange.agreed_gather import agreed_gather
from lightning_byzantine.exchange.witnesses import Witnesses

__all__ = ["Voters"]


class Voters:
    """The ranks that have one vote each: all but those that are proved to be faulty.

    Args:
        witnesses: know who is proved to be faulty; None for ranks that trust each other in what they tell others.
        observers: are told who was outvoted, with the next report.

    """

    def __init__(self, witnesses: Witnesses | None, observers: Observers) -> None:
        self._witnesses = witnesses
        self._observers = observers

    def ranks(self) -> Sequence[int]:
        """Return the v ranks that vote, in order."""
        return range(dist.get_world_size()) if self._witnesses is None else self._witnesses.voters

    def gather(self, tensor: Tensor) -> Tensor:
        """Return the flat tensor [n] of each voter, [v, n]."""
        return agreed_gather(tensor, self._witnesses)

    def note_outvoted(self, outvoted: Tensor) -> None:
        """Add to the next report which voters were outvoted, [v] bool."""
        of_all = outvoted.new_zeros(dist.get_world_size())
        of_all[list(self.ranks())] = outvoted
        self._observers.note_outvoted(of_all)
