"""Several ranks in one process, each with other columns of the same rows."""

from collections.abc import Callable
from typing import TypeVar

import torch
from torch import Tensor

from lightning_byzantine.matrix import WorkerMatrix

Result = TypeVar("Result")


class OthersWantedError(Exception):
    pass


def in_shards(act: Callable[[WorkerMatrix], Result], shards: list[Tensor]) -> list[Result]:
    """Do something to each shard of the columns, with statistics summed up over all of them.

    Args:
        act: is called again from the start for each sum, and has to do the same each time.
        shards: one [m, c] tensor for each rank.

    """
    sums: list[Tensor] = []

    def act_until_a_sum_is_unknown(shard: Tensor, rank: int, parts: list[Tensor]) -> Result | None:
        known = iter(sums)

        def complete(total: Tensor) -> Tensor:
            for done in known:
                return done.clone()
            parts.append(total)
            raise OthersWantedError

        try:
            return act(WorkerMatrix([shard], complete, rank))
        except OthersWantedError:
            return None

    while True:
        parts: list[Tensor] = []
        results = [act_until_a_sum_is_unknown(shard, rank, parts) for rank, shard in enumerate(shards)]
        if not parts:
            return results
        assert len(parts) == len(shards)
        sums.append(torch.stack(parts).sum(0))
