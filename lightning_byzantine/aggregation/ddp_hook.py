"""DDP's communication hook: where buckets of gradients leave backward, and come back aggregated."""

import torch
from torch import Tensor, nn
from torch.futures import Future
from torch.nn.parallel import DistributedDataParallel

from lightning_byzantine.aggregation.engine import AggregationEngine
from lightning_byzantine.aggregation.gradient_block import GradientBlock
from lightning_byzantine.exchange.torch_internals import GradBucket

__all__ = ["AggregationHook"]


class AggregationHook:
    """Hands DDP's buckets to the engine, and gives DDP the aggregated gradient when the last one has come.

    Each bucket is sent as soon as backward has filled it, and DDP gets an unfinished future for it.

    Args:
        engine: what happens to them.
        module: the module inside DDP. Parameters are known by their names there, since DDP rebuilds its buckets after
            the first step.

    """

    def __init__(self, engine: AggregationEngine, module: nn.Module) -> None:
        self._engine = engine
        self._names: dict[Tensor, str] = {parameter: name for name, parameter in module.named_parameters()}
        self._waiting: list[tuple[GradientBlock, Future[Tensor]]] = []

    def register(self, model: DistributedDataParallel) -> None:
        """Replace the model's all-reduce."""
        model.register_comm_hook(self, _hook)

    def __call__(self, bucket: GradBucket) -> Future[Tensor]:
        """Send one bucket, and after the last one aggregate."""
        buffer, parameters = bucket.buffer(), bucket.parameters()
        names = tuple(self._names[parameter] if parameter.requires_grad else None for parameter in parameters)
        block = GradientBlock(names, [parameter.numel() for parameter in parameters], buffer)
        devices: list[int | str | torch.device] = [buffer.device] if buffer.device.type != "cpu" else []
        future: Future[Tensor] = Future(devices=devices)
        self._waiting.append((block, future))
        self._engine.send(block)
        if bucket.is_last():
            waiting, self._waiting = self._waiting, []
            self._engine.aggregate()
            for done, claim in waiting:
                claim.set_result(done.buffer)
        return future


def _hook(state: AggregationHook, bucket: GradBucket) -> Future[Tensor]:
    # DDP insists on a parameter called `bucket`, and on these annotations if there are any.
    return state(bucket)
