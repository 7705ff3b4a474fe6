"""Several ranks in one process, each with other columns of the same rows."""

from collections.abc import Callable, Sequence
from typing import TypeVar

import torch
from torch import Tensor

from lightning_byzantine.matrix import Segments, WorkerMatrix

Result = TypeVar("Result")


class OthersWantedError(Exception):
    pass


def in_shards(
    act: Callable[[WorkerMatrix], Result], shards: Sequence[Tensor | list[Tensor]], segments: Segments | None = None
) -> list[Result]:
    """Do something to each shard of the columns, with statistics summed up over all of them.

    Args:
        act: is called again from the start for each sum, and has to do the same each time.
        shards: for each rank, one [m, c] tensor, or one for each block.
        segments: of the whole blocks.

    """
    sums: list[Tensor] = []

    def act_until_a_sum_is_unknown(shard: Tensor | list[Tensor], rank: int, parts: list[Tensor]) -> Result | None:
        known = iter(sums)
        blocks = [shard] if isinstance(shard, Tensor) else shard
        of_rank = None if segments is None else segments.shard(rank, [block.shape[1] for block in blocks])

        def complete(total: Tensor) -> Tensor:
            for done in known:
                return done.clone()
            parts.append(total)
            raise OthersWantedError

        try:
            return act(WorkerMatrix(blocks, complete, rank, segments=of_rank))
        except OthersWantedError:
            return None

    while True:
        parts: list[Tensor] = []
        results = [act_until_a_sum_is_unknown(shard, rank, parts) for rank, shard in enumerate(shards)]
        if not parts:
            return results
        assert len(parts) == len(shards)
        sums.append(torch.stack(parts).sum(0))
