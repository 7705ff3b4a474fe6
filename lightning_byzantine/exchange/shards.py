"""Vectors of which each rank of a worker holds a part."""

from dataclasses import dataclass

import torch.distributed as dist
from torch import Tensor

from lightning_byzantine.exchange.collectives import gather_rows

__all__ = ["Shards"]


@dataclass(frozen=True)
class Shards:
    """How the vectors of workers, each of which is a replica of several ranks, are divided among these.

    Args:
        across: process group of the ranks that hold this part of all replicas' vectors, in the order of replicas.
        within: process group of the ranks that hold all parts of this replica's vector.

    """

    across: dist.ProcessGroup
    within: dist.ProcessGroup

    @property
    def index(self) -> int:
        """Which part this rank holds."""
        return dist.get_rank(self.within)

    def sum(self, statistic: Tensor) -> Tensor:
        """Return the sum of a float64 statistic over all parts, the same to the bit in all replicas."""
        # In the order of ranks. In which order an all-reduce adds up could depend on how a replica's ranks are
        # connected, and its decisions would differ from those of other replicas.
        return gather_rows(statistic.reshape(-1), self.within).sum(0).view_as(statistic)
