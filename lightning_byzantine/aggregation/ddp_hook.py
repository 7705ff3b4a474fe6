"""DDP's communication hook: the path of one step from local gradients to the aggregated one."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch._C._distributed_c10d import GradBucket  # where torch.distributed.GradBucket is typed
from torch.futures import Future
from torch.nn.parallel import DistributedDataParallel

from lightning_byzantine.aggregation.gradients import clipping_factor, unscaled
from lightning_byzantine.aggregation.local_gradients import LocalGradients
from lightning_byzantine.errors import ByzantineBreakdownError
from lightning_byzantine.estimators.estimator import Estimator, keep
from lightning_byzantine.exchange.exchange import Exchange
from lightning_byzantine.matrix import Names, WorkerMatrix

__all__ = ["AggregationHook"]


@dataclass
class _Bucket:
    """One DDP bucket on its way: what the workers sent for it, and DDP's claim to the result."""

    names: Names
    sizes: list[int]
    gradient: Tensor  # DDP's buffer
    future: Future[Tensor]
    sent: Tensor = field(init=False)  # [k, c]

    def parts(self, *buffers: Tensor) -> Iterable[tuple[Any, ...]]:
        """Return each parameter's name with its part, the last dimension, of each buffer."""
        return zip(self.names, *(torch.split(buffer, self.sizes, dim=-1) for buffer in buffers), strict=True)


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
        num_local_workers: how many workers this process acts as, k.
        previous: where to keep what the rule returned last, by parameter name, for a rule that starts from it; None for
            rules that don't.
        tolerates: tells whether a breakdown of the rule may be answered with gradients of NaN, which somebody takes
            care of, instead of an error.

    Attributes:
        exchange: as given.
        gradients: keeps the local workers' gradients apart.

    """

    def __init__(
        self,
        module: nn.Module,
        exchange: Exchange,
        aggregate: Callable[[WorkerMatrix], list[Tensor]],
        estimator: Estimator | None = None,
        loss_scale: Callable[[], float | None] = lambda: None,
        max_norm: float | None = None,
        num_local_workers: int = 1,
        previous: dict[str, Tensor] | None = None,
        tolerates: Callable[[ByzantineBreakdownError], bool] = lambda error: False,
    ) -> None:
        self.exchange = exchange
        parameters = dict(module.named_parameters())
        self.gradients = LocalGradients(parameters, num_local_workers)
        self._aggregate = aggregate
        self._estimator = estimator
        self._loss_scale = loss_scale
        self._max_norm = max_norm
        self._previous = previous
        self._tolerates = tolerates
        self._names: dict[Tensor, str] = {parameter: name for name, parameter in parameters.items()}
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
        parameters = bucket.parameters()
        names = tuple(self._names[parameter] if parameter.requires_grad else None for parameter in parameters)
        self._buckets.append(_Bucket(names, [parameter.numel() for parameter in parameters], buffer, future))
        if self._max_norm is None:
            self._send(self._buckets[-1])
        if bucket.is_last():
            buckets, self._buckets = self._buckets, []
            if self._max_norm is not None:
                factors = self._clipping_factors(buckets, self._max_norm)
                for waiting in buckets:
                    self._send(waiting, factors)
            for done, gradient in zip(buckets, self._aggregated_gradients(buckets), strict=True):
                done.future.set_result(gradient)
            self.gradients.clear()
        return future

    def _clipping_factors(self, buckets: list[_Bucket], max_norm: float) -> list[Tensor]:
        # By name, for the last digit not to depend on how DDP made its buckets.
        parts = {name: part for bucket in buckets for name, part in bucket.parts(bucket.gradient) if name is not None}
        return [
            clipping_factor(
                [unscaled(self.gradients.of(worker, name, parts[name]), self._scale) for name in sorted(parts)],
                max_norm,
            )
            for worker in range(self.gradients.num_workers)
        ]

    def _send(self, bucket: _Bucket, factors: list[Tensor] | None = None) -> None:
        as_it_came = self._estimator is None and factors is None and self._scale is None
        if as_it_came and self.gradients.num_workers == 1:
            bucket.sent = bucket.gradient[None]
        else:
            bucket.sent = self._rows(bucket, factors)
        self.exchange.start(bucket.sent, bucket.names)

    def _rows(self, bucket: _Bucket, factors: list[Tensor] | None) -> Tensor:
        like = bucket.gradient[:0].to(torch.promote_types(bucket.gradient.dtype, torch.float32))
        rows = self.exchange.room(self.gradients.num_workers, bucket.gradient.numel(), like)
        for name, arrived, part in bucket.parts(bucket.gradient, rows):
            if name is None:
                part.zero_()
                continue
            for worker, out in enumerate(part):
                # Momentum mixes steps, and lengths that rules are told are of gradients: no loss scale that changes.
                gradient = unscaled(self.gradients.of(worker, name, arrived), self._scale)
                if factors is not None:
                    gradient = gradient * factors[worker]
                if self._estimator is None:
                    out.copy_(gradient)
                else:
                    self._estimator.estimate(name, gradient, out, worker)
        return rows

    def _aggregated_gradients(self, buckets: list[_Bucket]) -> list[Tensor]:
        matrix = self.exchange.finish(self._previous_blocks(buckets))
        try:
            aggregates = self.exchange.collect(self._aggregate(matrix))
            self._keep(buckets, aggregates)
        except ByzantineBreakdownError as error:
            if self._estimator is not None:
                for worker in range(self.gradients.num_workers):
                    self._estimator.discard(worker)
            # An overflow of most workers is the scaler's business: it sees it, skips the step and lowers the scale.
            if self._scale is None and not self._tolerates(error):
                raise
            return [torch.full_like(bucket.gradient, torch.nan) for bucket in buckets]
        if self._estimator is not None:
            # What would be dropped by everybody else must not stay in a worker's own state either.
            for worker, measurable in enumerate(WorkerMatrix([bucket.sent for bucket in buckets]).measure().is_measurable):
                if measurable:
                    self._estimator.commit(worker)
                else:
                    self._estimator.discard(worker)
        return [self._gradient(*pair) for pair in zip(buckets, aggregates, strict=True)]

    def _previous_blocks(self, buckets: list[_Bucket]) -> list[Tensor] | None:
        if not self._previous:
            return None
        blocks = []
        for bucket in buckets:
            block = bucket.sent.new_zeros(bucket.sent.shape[1])
            for name, part in bucket.parts(block):
                if name in self._previous:
                    part.copy_(self._previous[name])
            blocks.append(block)
        return blocks

    def _keep(self, buckets: list[_Bucket], aggregates: list[Tensor]) -> None:
        if self._previous is not None:
            for bucket, aggregate in zip(buckets, aggregates, strict=True):
                keep({name: part for name, part in bucket.parts(aggregate) if name is not None}, self._previous)

    def _gradient(self, bucket: _Bucket, aggregate: Tensor) -> Tensor:
        # Into DDP's own buffer, as its all-reduce does, which saves DDP a copy.
        for name, part, target in bucket.parts(aggregate, bucket.gradient):
            if name is None or self._estimator is None:
                target.copy_(part)
            else:
                self._estimator.gradient(name, part, target)
        return bucket.gradient if self._scale is None else bucket.gradient.mul_(self._scale)


def _hook(state: AggregationHook, bucket: GradBucket) -> Future[Tensor]:
    # DDP insists on a parameter called `bucket`, and on these annotations if there are any.
    return state(bucket)
