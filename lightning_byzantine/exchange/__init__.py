"""Communication between ranks: gradients, buffers and metrics."""

from collections.abc import Callable

from lightning_byzantine.exchange.all_gather import AllGather
from lightning_byzantine.exchange.all_to_all import AllToAll
from lightning_byzantine.exchange.exchange import Exchange
from lightning_byzantine.exchange.shards import Shards
from lightning_byzantine.exchange.single_rank import SingleRank
from lightning_byzantine.exchange.witnesses import Witnesses

__all__ = ["EXCHANGES", "AllGather", "AllToAll", "Exchange", "Shards", "SingleRank", "make_exchange"]

EXCHANGES: dict[str, Callable[[int, Witnesses | None, Shards | None], Exchange]] = {
    "all_gather": AllGather,
    "all_to_all": AllToAll,
}


def make_exchange(
    name: str, num_ranks: int, witnesses: Witnesses | None = None, shards: Shards | None = None
) -> Exchange:
    """Return an exchange among all ranks, which needs a process group unless there is only one rank.

    Args:
        name: "all_gather" or "all_to_all".
        num_ranks: number of processes.
        witnesses: compare what ranks tell each other; None for ranks that trust each other in this.
        shards: where a rank holds a part of its worker's vector only; the exchange is one of those with the same part.

    """
    return SingleRank(None, shards) if num_ranks == 1 else EXCHANGES[name](num_ranks, witnesses, shards)
