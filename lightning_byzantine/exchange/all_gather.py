"""The exchange in which every rank aggregates for itself."""

import torch.distributed as dist
from torch import Tensor

from lightning_byzantine.exchange.collectives import arriving, start_gather
from lightning_byzantine.exchange.kept_memory import KeptMemory
from lightning_byzantine.matrix import Names, WorkerMatrix
from lightning_byzantine.matrix.arriving import Arriving

__all__ = ["AllGather"]


class AllGather:
    """Every rank receives every worker's vector and aggregates for itself, without trusting any other rank.

    A rank receives (m - k) d elements and holds (m + k + 1) d: all vectors, its own, and the result.

    Args:
        num_ranks: number of processes, m / k.

    """

    def __init__(self, num_ranks: int) -> None:
        self._num_ranks = num_ranks
        self._started: list[tuple[Tensor, Names, list[dist.Work]]] = []
        self._arriving = Arriving([])
        self._sent, self._received = KeptMemory(), KeptMemory()

    @property
    def rank(self) -> int:
        """Rank of this process."""
        return dist.get_rank()

    def allocate(self, num_rows: int, num_columns: int, like: Tensor) -> Tensor:
        """Return kept memory."""
        return self._sent.get(len(self._started), like, num_rows, num_columns)

    def start(self, rows: Tensor, names: Names = ()) -> None:
        """Gather one block asynchronously, while backward continues."""
        received = self._received.get(len(self._started), rows, self._num_ranks * rows.shape[0], rows.shape[1])
        self._started.append((received, names, start_gather(received.view(-1), rows.view(-1))))

    def finish(self) -> WorkerMatrix:
        """Return all vectors."""
        started, self._started = self._started, []
        self._arriving = arriving([rows for rows, *_ in started], [works for *_, works in started])
        for memory in (self._sent, self._received):
            memory.keep(len(started))
        return WorkerMatrix(self._arriving, layout=tuple(names for _, names, _ in started))

    def own_columns(self, wholes: list[Tensor]) -> list[Tensor]:
        """Return all columns."""
        return wholes

    def collect(self, parts: list[Tensor]) -> list[Tensor]:
        """Return the parts: every rank has aggregated all columns."""
        list(self._arriving)  # waits for blocks that the rule did not read, which would block other ranks
        return parts
