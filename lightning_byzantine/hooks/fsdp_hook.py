"""The hook of a model that FSDP2 divides among the ranks of each replica."""

from typing import Any

import torch
import torch.distributed as dist
from typing_extensions import override

from lightning_byzantine.aggregation.engine import AggregationEngine
from lightning_byzantine.aggregation.shard_layout import ShardLayout
from lightning_byzantine.aggregation.sharded_gradients import ShardedGradients
from lightning_byzantine.aggregation.sharded_states import ShardedStates
from lightning_byzantine.aggregators import Aggregator
from lightning_byzantine.estimators import Estimator
from lightning_byzantine.exchange import Shards, make_exchange
from lightning_byzantine.hooks.robust_hook import RobustHook

__all__ = ["FSDPHook"]


class FSDPHook(RobustHook):
    """The robust aggregation of a divided model's gradients; made by :func:`~lightning_byzantine.hooks.robust_fsdp`.

    Each replica is one worker.

    Args:
        layout: the model's parameters.
        shards: the ranks.
        device: where the model trains.
        aggregator: the rule, not shared with other models.
        num_byzantine: number of replicas that may be Byzantine, f.
        estimator: what this rank sends, not shared with other models; None for raw gradients.
        exchange: "all_gather" or "all_to_all".
        **engine: other arguments of :class:`~lightning_byzantine.aggregation.engine.AggregationEngine`.

    """

    def __init__(
        self,
        layout: ShardLayout,
        shards: Shards,
        device: torch.device,
        aggregator: Aggregator,
        num_byzantine: int,
        estimator: Estimator | None,
        exchange: str,
        **engine: Any,
    ) -> None:
        super().__init__(dist.get_world_size(shards.across), aggregator, num_byzantine, estimator)
        self._layout = layout
        self._shards = shards
        self._device = device
        self._engine = AggregationEngine(
            dict(layout.parameters),
            self._aggregation(),
            make_exchange(exchange, self.num_workers, None, shards),
            estimator,
            **engine,
        )
        self._gradients = ShardedGradients(self._engine, layout)

    def aggregate(self) -> None:
        """Replace the gradients of this rank's replica by the aggregate of all replicas'.

        Must be called on all ranks, after the last backward of each step, and before gradients are clipped.

        Raises:
            ByzantineBreakdownError: if more replicas have non-finite gradients than may be Byzantine.

        """
        self._gradients.aggregate()

    @override
    def _states(self) -> ShardedStates:
        worker = dist.get_rank(self._shards.across)
        return ShardedStates(
            dict(self._layout.parameters),
            self.aggregator,
            self.estimator,
            range(worker, worker + 1),
            self.num_workers,
            self._device,
            "start from zero: leave out `hook.load_state_dict(state)`.",
            self._layout,
            self._shards,
        )
