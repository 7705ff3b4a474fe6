"""DDP's communication hook: the path of one step from local gradients to the aggregated one."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch._C._distributed_c10d import GradBucket  # where torch.distributed.GradBucket is typed
from torch.futures import Future
from torch.nn.parallel import DistributedDataParallel

from lightning_byzantine.errors import ByzantineBreakdownError
from lightning_byzantine.estimators import Estimator
from lightning_byzantine.exchange import Exchange
from lightning_byzantine.matrix import WorkerMatrix

__all__ = ["AggregationHook"]


@dataclass
class _Bucket:
    """One DDP bucket on its way: its gradients, what the worker sent for them, and DDP's claim to the result."""

    names: list[str]
    gradients: list[Tensor]
    buffer: Tensor
    sent: Tensor
    future: Future[Tensor]

    @property
    def sizes(self) -> list[int]:
        return [gradient.numel() for gradient in self.gradients]


class AggregationHook:
    """Aggregates whole gradients over workers, though DDP hands them over bucket by bucket.

    Each bucket is sent as soon as backward has filled it, and DDP gets an unfinished future for it. With the last
    bucket the rule runs once on the whole matrix and completes all futures: bucket by bucket it would be another
    algorithm, that may follow another worker in each bucket.

    Args:
        module: the module inside DDP. Parameters are known by their names there, since DDP rebuilds its buckets after
            the first step.
        exchange: brings the workers' vectors together.
        aggregate: the rule: from the matrix to one vector, block by block.
        estimator: what a worker sends; None for the raw gradient.
        loss_scale: returns the factor that the loss was multiplied by, None without a gradient scaler.

    """

    def __init__(
        self,
        module: nn.Module,
        exchange: Exchange,
        aggregate: Callable[[WorkerMatrix], list[Tensor]],
        estimator: Estimator | None = None,
        loss_scale: Callable[[], float | None] = lambda: None,
    ) -> None:
        self.exchange = exchange
        self._aggregate = aggregate
        self._estimator = estimator
        self._loss_scale = loss_scale
        self._names: dict[Tensor, str] = {parameter: name for name, parameter in module.named_parameters()}
        self._buckets: list[_Bucket] = []

    def register(self, model: DistributedDataParallel) -> None:
        """Replace the model's all-reduce."""
        model.register_comm_hook(self, _hook)

    @torch.no_grad()
    def __call__(self, bucket: GradBucket) -> Future[Tensor]:
        """Send one bucket, and after the last one aggregate."""
        buffer = bucket.buffer()
        names = [self._names[parameter] for parameter in bucket.parameters()]
        devices: list[int | str | torch.device] = [buffer.device] if buffer.device.type != "cpu" else []
        future: Future[Tensor] = Future(devices=devices)
        gradients = bucket.gradients()
        sent = self._estimate(names, gradients, buffer)
        self._buckets.append(_Bucket(names, gradients, buffer, sent, future))
        self.exchange.start(sent)
        if bucket.is_last():
            buckets, self._buckets = self._buckets, []
            for done, gradient in zip(buckets, self._aggregated_gradients(buckets), strict=True):
                done.future.set_result(gradient)
        return future

    def _estimate(self, names: list[str], gradients: list[Tensor], buffer: Tensor) -> Tensor:
        if self._estimator is None:
            return buffer
        # Half precision is too coarse to add up momentum in, and DDP's buffer is not ours to keep.
        sent = torch.empty_like(buffer, dtype=torch.promote_types(buffer.dtype, torch.float32))
        parts = torch.split(sent, [gradient.numel() for gradient in gradients])
        # Momentum mixes steps, and so must not see a loss scale that changes between them.
        scale = self._loss_scale() or 1.0
        for name, gradient, part in zip(names, gradients, parts, strict=True):
            gradient = gradient.flatten().to(part.dtype)
            self._estimator.estimate(name, gradient / scale if scale != 1 else gradient, out=part)
        return sent

    def _aggregated_gradients(self, buckets: list[_Bucket]) -> list[Tensor]:
        matrix = self.exchange.finish()
        try:
            aggregates = self._aggregate(matrix)
        except ByzantineBreakdownError:
            self._settle(accept=False)
            if self._loss_scale() is None:
                raise
            # An overflow of most workers is the scaler's business: it sees it, skips the step and lowers the scale.
            return [torch.full_like(bucket.buffer, torch.nan) for bucket in buckets]
        # What would be dropped by everybody else must not stay in this worker's own state either.
        own = WorkerMatrix([bucket.sent[None] for bucket in buckets])
        self._settle(accept=self._estimator is not None and bool(own.measurable()))
        return [self._gradient(bucket, part) for bucket, part in zip(buckets, aggregates, strict=True)]

    def _settle(self, *, accept: bool) -> None:
        if self._estimator is not None:
            if accept:
                self._estimator.commit()
            else:
                self._estimator.discard()

    def _gradient(self, bucket: _Bucket, aggregate: Tensor) -> Tensor:
        if self._estimator is None:
            return aggregate
        parts = torch.split(aggregate, bucket.sizes)
        gradients = [self._estimator.gradient(name, part) for name, part in zip(bucket.names, parts, strict=True)]
        return (torch.cat(gradients) * (self._loss_scale() or 1.0)).to(bucket.buffer.dtype)


def _hook(state: AggregationHook, bucket: GradBucket) -> Future[Tensor]:
    # DDP insists on these parameter names and annotations.
    return state(bucket)
