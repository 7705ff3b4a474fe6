"""The exchange in which every rank aggregates for itself."""

from torch import Tensor

from lightning_byzantine.exchange.collectives import start_gather
from lightning_byzantine.exchange.exchange import Exchange, Wait

__all__ = ["AllGather"]


class AllGather(Exchange):
    """Every rank receives every worker's vector and aggregates for itself, without trusting any other rank.

    A rank receives (m - k) d elements and holds (m + k + 1) d: all vectors, its own, and the result.

    Args:
        num_ranks: number of processes, m / k.

    """

    def __init__(self, num_ranks: int) -> None:
        super().__init__()
        self._num_ranks = num_ranks

    def send(self, index: int, rows: Tensor) -> tuple[Tensor, list[Wait]]:
        """Gather one block asynchronously, while backward continues."""
        received = self._received.get(index, rows, self._num_ranks * rows.shape[0], rows.shape[1])
        return received, start_gather(received.view(-1), rows.view(-1))
