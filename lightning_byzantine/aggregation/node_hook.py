"""DDP's communication hook where all ranks of a node are one worker."""

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from typing_extensions import override

from lightning_byzantine.aggregation.ddp_hook import AggregationHook
from lightning_byzantine.aggregation.engine import AggregationEngine
from lightning_byzantine.aggregation.gradient_block import GradientBlock
from lightning_byzantine.aggregation.slices import Slices
from lightning_byzantine.exchange.torch_internals import GradBucket

__all__ = ["NodeHook"]


class NodeHook(AggregationHook):
    """Averages each bucket within the node, of which each rank then sends its slices to the same ranks of other nodes.

    A bucket is averaged while backward fills the next one, and sent after that.

    Args:
        engine: aggregates the slices.
        module: the module inside DDP.
        slices: which ones are this rank's.

    """

    def __init__(self, engine: AggregationEngine, module: nn.Module, slices: Slices) -> None:
        super().__init__(engine, module)
        self._slices = slices
        self._averaged: tuple[GradBucket, GradientBlock, Any] | None = None

    @override
    def send(self, bucket: GradBucket) -> GradientBlock:
        names = self.names_in(bucket)
        mean = bucket.buffer().div_(self._slices.num_ranks)
        work = dist.all_reduce(mean, group=self._slices.shards.within, async_op=True)
        self._send_averaged()
        sizes = [self._slices.num_columns(name) for name in names]
        starts = {name: self._slices.start(name) for name in names}
        block = GradientBlock(names, sizes, mean.new_empty(sum(sizes)), starts)
        self._averaged = bucket, block, work
        return block

    @override
    def aggregate(self) -> None:
        self._send_averaged()
        super().aggregate()

    @override
    def result(self, bucket: GradBucket, block: GradientBlock) -> Tensor:
        parts = torch.split(block.buffer, block.sizes)
        return torch.cat(self._slices.wholes(block.names, parts), out=bucket.buffer())

    def _send_averaged(self) -> None:
        if self._averaged is None:
            return
        (bucket, block, work), self._averaged = self._averaged, None
        work.wait()
        wholes = torch.split(bucket.buffer(), [self._slices.sizes[name] for name in block.names])
        slices = [self._slices.part_of_whole(name, whole) for name, whole in zip(block.names, wholes, strict=True)]
        torch.cat(slices, out=block.buffer)
        self._engine.send(block)
