"""DDP's communication hook: the path of one step from local gradients to the aggregated one."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch._C._distributed_c10d import GradBucket  # where torch.distributed.GradBucket is typed
from torch.futures import Future
from torch.nn.parallel import DistributedDataParallel

from lightning_byzantine.errors import ByzantineBreakdownError
from lightning_byzantine.estimators import Estimator
from lightning_byzantine.exchange import Exchange
from lightning_byzantine.gradients import clipping_factor, unscaled
from lightning_byzantine.matrix import WorkerMatrix

__all__ = ["AggregationHook"]


@dataclass
class _Bucket:
    """One DDP bucket on its way: what the worker sent for it, and DDP's claim to the result."""

    names: list[str | None]  # by parameter; None for one that is switched off, as `toggle_optimizer` does
    sizes: list[int]
    gradient: Tensor  # DDP's buffer
    future: Future[Tensor]
    sent: Tensor = field(init=False)

    def parts(self, *buffers: Tensor) -> Iterable[tuple[Any, ...]]:
        """Return each parameter's name with its part of each buffer."""
        return zip(self.names, *(torch.split(buffer, self.sizes) for buffer in buffers), strict=True)


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
        max_norm: clips each worker's gradient to this norm before the estimator; None for no clipping. Nothing is sent
            then before backward has ended, for only then is the norm known.
        tolerates: tells whether a breakdown of the rule may be answered with gradients of NaN, which somebody takes
            care of, instead of an error.

    """

    def __init__(
        self,
        module: nn.Module,
        exchange: Exchange,
        aggregate: Callable[[WorkerMatrix], list[Tensor]],
        estimator: Estimator | None = None,
        loss_scale: Callable[[], float | None] = lambda: None,
        max_norm: float | None = None,
        tolerates: Callable[[ByzantineBreakdownError], bool] = lambda error: False,
    ) -> None:
        self.exchange = exchange
        self._aggregate = aggregate
        self._estimator = estimator
        self._loss_scale = loss_scale
        self._max_norm = max_norm
        self._tolerates = tolerates
        self._names: dict[Tensor, str] = {parameter: name for name, parameter in module.named_parameters()}
        self._scale: float | None = None
        self._buckets: list[_Bucket] = []

    def register(self, model: DistributedDataParallel) -> None:
        """Replace the model's all-reduce."""
        model.register_comm_hook(self, _hook)

    @torch.no_grad()
    def __call__(self, bucket: GradBucket) -> Future[Tensor]:
        """Send one bucket, and after the last one aggregate."""
        if not self._buckets:
            self._scale = self._loss_scale()  # once a step, since a GPU has to be waited for
        buffer = bucket.buffer()
        devices: list[int | str | torch.device] = [buffer.device] if buffer.device.type != "cpu" else []
        future: Future[Tensor] = Future(devices=devices)
        names = [self._names[parameter] if parameter.requires_grad else None for parameter in bucket.parameters()]
        sizes = [parameter.numel() for parameter in bucket.parameters()]
        self._buckets.append(_Bucket(names, sizes, buffer, future))
        if self._max_norm is None:
            self._send(self._buckets[-1])
        if bucket.is_last():
            buckets, self._buckets = self._buckets, []
            if self._max_norm is not None:
                factor = self._clipping_factor(buckets, self._max_norm)
                for waiting in buckets:
                    self._send(waiting, factor)
            for done, gradient in zip(buckets, self._aggregated_gradients(buckets), strict=True):
                done.future.set_result(gradient)
        return future

    def _clipping_factor(self, buckets: list[_Bucket], max_norm: float) -> Tensor:
        # By name, for the last digit not to depend on how DDP made its buckets.
        parts = {name: part for bucket in buckets for name, part in bucket.parts(bucket.gradient) if name is not None}
        return clipping_factor([unscaled(parts[name], self._scale) for name in sorted(parts)], max_norm)

    def _send(self, bucket: _Bucket, factor: Tensor | None = None) -> None:
        if self._estimator is None:
            bucket.sent = bucket.gradient if factor is None else bucket.gradient * factor
        else:
            bucket.sent = self._estimate(self._estimator, bucket, factor)
        self.exchange.start(bucket.sent)

    def _estimate(self, estimator: Estimator, bucket: _Bucket, factor: Tensor | None) -> Tensor:
        # Momentum mixes steps, and so must not see a loss scale that changes between them.
        gradients = unscaled(bucket.gradient, self._scale)
        if factor is not None:
            gradients = gradients * factor
        sent = torch.empty_like(gradients)
        for name, gradient, part in bucket.parts(gradients, sent):
            if name is None:
                part.zero_()
            else:
                estimator.estimate(name, gradient, out=part)
        return sent

    def _aggregated_gradients(self, buckets: list[_Bucket]) -> list[Tensor]:
        matrix = self.exchange.finish()
        try:
            aggregates = self.exchange.collect(self._aggregate(matrix))
        except ByzantineBreakdownError as error:
            if self._estimator is not None:
                self._estimator.discard()
            # An overflow of most workers is the scaler's business: it sees it, skips the step and lowers the scale.
            if self._scale is None and not self._tolerates(error):
                raise
            return [torch.full_like(bucket.gradient, torch.nan) for bucket in buckets]
        if self._estimator is None:
            return aggregates
        # What would be dropped by everybody else must not stay in this worker's own state either.
        if WorkerMatrix([bucket.sent[None] for bucket in buckets]).measurable():
            self._estimator.commit()
        else:
            self._estimator.discard()
        return [self._gradient(self._estimator, *pair) for pair in zip(buckets, aggregates, strict=True)]

    def _gradient(self, estimator: Estimator, bucket: _Bucket, aggregate: Tensor) -> Tensor:
        # Into DDP's own buffer, as its all-reduce does, which saves DDP a copy.
        for name, part, target in bucket.parts(aggregate, bucket.gradient):
            gradient = part if name is None else estimator.gradient(name, part)
            target.copy_(gradient if self._scale is None else gradient * self._scale)
        return bucket.gradient


def _hook(state: AggregationHook, bucket: GradBucket) -> Future[Tensor]:
    # DDP insists on a parameter called `bucket`, and on these annotations if there are any.
    return state(bucket)
