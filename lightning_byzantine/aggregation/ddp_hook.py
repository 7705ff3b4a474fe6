"""DDP's communication hook, which sends buckets of gradients and returns them aggregated."""

import weakref

import torch
from torch import Tensor, nn
from torch.futures import Future
from torch.nn.parallel import DistributedDataParallel

from lightning_byzantine.aggregation.engine import AggregationEngine
from lightning_byzantine.aggregation.gradient_block import GradientBlock
from lightning_byzantine.aggregation.gradients import flat_size, flattened
from lightning_byzantine.aggregation.sparse_gradients import sparsified, touched_rows
from lightning_byzantine.aggregation.used_parameters import UsedParameters
from lightning_byzantine.exchange.torch_internals import GradBucket

__all__ = ["AggregationHook"]


class AggregationHook:
    """Passes DDP's buckets to the engine, and the aggregated gradient back to DDP after the last bucket.

    Each bucket is sent as soon as backward has filled it; DDP receives an unfinished future. If parameters may be
    unused, those that no rank has used since the last aggregation are left out, as DDP leaves their gradients alone.

    Args:
        engine: aggregates the buckets.
        module: the module inside DDP. Its parameters are identified by name, because DDP rebuilds its buckets after
            the first step.

    """

    def __init__(self, engine: AggregationEngine, module: nn.Module) -> None:
        self._engine = engine
        self._parameters = dict(module.named_parameters())
        self._names: dict[Tensor, str] = {parameter: name for name, parameter in self._parameters.items()}
        self._used: UsedParameters | None = None
        self._waiting: list[tuple[GradBucket, GradientBlock, Future[Tensor]]] = []

    def register(self, model: DistributedDataParallel) -> None:
        """Replace the model's all-reduce."""
        if model.find_unused_parameters or model.static_graph:
            self._used = UsedParameters(self._parameters)
            weakref.finalize(model, self._used.remove)
        model.register_comm_hook(self, _hook)

    def __call__(self, bucket: GradBucket) -> Future[Tensor]:
        """Send one bucket, and aggregate after the last one."""
        device = bucket.buffer().device
        devices: list[int | str | torch.device] = [device] if device.type != "cpu" else []
        future: Future[Tensor] = Future(devices=devices)
        self._waiting.append((bucket, self.send(bucket), future))
        if bucket.is_last():
            waiting, self._waiting = self._waiting, []
            self.aggregate()
            for sent, done, claim in waiting:
                claim.set_result(self.result(sent, done))
        return future

    def names_in(self, bucket: GradBucket) -> tuple[str, ...]:
        """Return the names of a bucket's parameters, in order."""
        return tuple(self._names[parameter] for parameter in bucket.parameters())

    def send(self, bucket: GradBucket) -> GradientBlock:
        """Start sending a bucket; return what it is to the engine."""
        buffer, parameters = bucket.buffer(), bucket.parameters()
        if buffer.is_sparse:  # that of a single parameter
            buffer = flattened(buffer, parameters[0])
        block = GradientBlock(self.names_in(bucket), [flat_size(parameter) for parameter in parameters], buffer)
        self._engine.send(block)
        return block

    def aggregate(self) -> None:
        """Aggregate all buckets that were sent."""
        self._engine.aggregate(None if self._used is None else self._used.take())

    def result(self, bucket: GradBucket, block: GradientBlock) -> Tensor:
        """Return what DDP gets for a bucket."""
        return self._sparse_result(bucket, block.buffer) if bucket.buffer().is_sparse else block.buffer

    def _sparse_result(self, bucket: GradBucket, result: Tensor) -> Tensor:
        # Of the rows that any rank has touched, as by DDP's all-reduce: optimizers leave the others alone.
        touched = self._engine.exchange.on_any_rank(touched_rows(bucket.buffer()))
        (parameter,) = bucket.parameters()
        return sparsified(result.as_strided(parameter.shape, parameter.stride()), touched)


def _hook(state: AggregationHook, bucket: GradBucket) -> Future[Tensor]:
    # DDP requires a parameter called `bucket`, and checks annotations.
    return state(bucket)
