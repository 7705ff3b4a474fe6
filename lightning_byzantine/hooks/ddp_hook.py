"""The hook of a model in DistributedDataParallel."""

from collections.abc import Collection, Iterable
from functools import partial
from typing import Any

import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from typing_extensions import override

from lightning_byzantine.aggregation.ddp_hook import AggregationHook
from lightning_byzantine.aggregation.engine import AggregationEngine
from lightning_byzantine.aggregation.quarantine import rank_errors
from lightning_byzantine.aggregation.voters import Voters
from lightning_byzantine.aggregation.worker_states import WorkerStates
from lightning_byzantine.aggregators import Aggregator
from lightning_byzantine.estimators import Estimator
from lightning_byzantine.exchange import make_exchange
from lightning_byzantine.exchange.robust_buffers import RobustBuffers
from lightning_byzantine.exchange.witnesses import Witnesses
from lightning_byzantine.hooks.robust_hook import RobustHook

__all__ = ["DDPHook"]


class DDPHook(RobustHook):
    """The robust aggregation of a model's gradients; made by :func:`~lightning_byzantine.hooks.robust_ddp`.

    Each rank is one worker.

    Args:
        model: the module wrapped in DDP.
        aggregator: the rule, not shared with other models.
        num_byzantine: number of workers that may be Byzantine, f.
        estimator: what this rank sends, not shared with other models; None for raw gradients.
        exchange: "all_gather" or "all_to_all".
        robust_buffers: whether all ranks vote on buffers.
        **engine: other arguments of :class:`~lightning_byzantine.aggregation.engine.AggregationEngine`.

    Attributes:
        model: as given.

    """

    def __init__(
        self,
        model: DistributedDataParallel,
        aggregator: Aggregator,
        num_byzantine: int,
        estimator: Estimator | None,
        exchange: str,
        robust_buffers: bool,
        **engine: Any,
    ) -> None:
        super().__init__(dist.get_world_size(), aggregator, num_byzantine, estimator)
        self.model = model
        self._parameters = dict(model.module.named_parameters())
        self._device = next(iter(self._parameters.values())).device
        self._witnesses: Witnesses | None = None
        if num_byzantine > 0:
            self._witnesses = Witnesses(num_byzantine, self._device, self._exclude)
        self._engine = AggregationEngine(
            self._parameters,
            self._aggregation(),
            make_exchange(exchange, self.num_workers, self._witnesses),
            estimator,
            **engine,
        )
        AggregationHook(self._engine, model.module).register(model)
        self._buffers: RobustBuffers | None = None
        if robust_buffers and self.num_workers > 1:
            voters = Voters(self._witnesses, self._observers)
            self._buffers = RobustBuffers(model, voters.gather, voters.ranks, voters.note_outvoted)
        frozen = {name: parameter for name, parameter in self._parameters.items() if not parameter.requires_grad}
        model.register_forward_pre_hook(partial(_check_still_frozen, frozen))

    @override
    def quarantine(self, workers: Iterable[int], *, proved: bool = False) -> None:
        super().quarantine(workers, proved=proved)
        if self._witnesses is not None:
            self._witnesses.exclude(self._quarantine.proved)

    def synchronize_buffers(self) -> None:
        """Let all ranks vote on buffers now instead of before the next forward, such as after the last step.

        Must be called on all ranks. :meth:`state_dict` does it as well.
        """
        if self._buffers is not None:
            self._buffers.synchronize()

    @override
    def state_dict(self) -> dict[str, Any]:
        self.synchronize_buffers()
        return super().state_dict()

    def _exclude(self, ranks: Collection[int]) -> None:
        """Drop the rows of ranks that are proved to have told others different things, and report them."""
        self._observers.note_equivocated(ranks)
        with rank_errors(ranks):
            self.quarantine(ranks, proved=True)

    @override
    def _states(self) -> WorkerStates:
        own = range(dist.get_rank(), dist.get_rank() + 1)
        return WorkerStates(
            self._parameters,
            self.aggregator,
            self.estimator,
            own,
            self.num_workers,
            self._device,
            remedy=(
                "start from zero: leave out `hook.load_state_dict(state)`, or with Fabric give `restart_estimator=True`"
                " to the strategy."
            ),
        )


def _check_still_frozen(frozen: dict[str, nn.Parameter], model: nn.Module, inputs: Any) -> None:
    for name, parameter in frozen.items():
        if parameter.requires_grad:
            raise RuntimeError(
                f"The parameter {name!r} was frozen when `robust_ddp` was called, so DDP may not know it, and its"
                " gradient would bypass the aggregation. Freeze after `robust_ddp`, with find_unused_parameters=True."
            )
