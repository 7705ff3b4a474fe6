"""What makes one model's training robust, in a loop that is not ours."""

import warnings
from collections.abc import Callable, Collection, Iterable, Sequence
from functools import partial
from typing import Any

import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.hooks import RemovableHandle

from lightning_byzantine.aggregation.aggregation import Aggregation, SingleWorker
from lightning_byzantine.aggregation.ddp_hook import AggregationHook
from lightning_byzantine.aggregation.engine import AggregationEngine
from lightning_byzantine.aggregation.observers import Observers
from lightning_byzantine.aggregation.quarantine import Quarantine, rank_errors
from lightning_byzantine.aggregation.robust_aggregation import RobustAggregation
from lightning_byzantine.aggregation.voters import Voters
from lightning_byzantine.aggregation.worker_states import WorkerStates
from lightning_byzantine.aggregators import Aggregator, Report
from lightning_byzantine.attacks import Attack
from lightning_byzantine.estimators import Estimator
from lightning_byzantine.exchange import make_exchange
from lightning_byzantine.exchange.robust_buffers import RobustBuffers
from lightning_byzantine.exchange.witnesses import Witnesses

__all__ = ["RobustHook"]


class RobustHook:
    """The robust aggregation of one model's gradients; made by :func:`~lightning_byzantine.hooks.robust_ddp`.

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
        aggregator: as given.
        num_byzantine: as given.
        estimator: as given.

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
        self.model = model
        self.aggregator = aggregator
        self.num_byzantine = num_byzantine
        self.estimator = estimator
        self._parameters = dict(model.module.named_parameters())
        self._device = next(iter(self._parameters.values())).device
        self._quarantine = Quarantine()
        self._observers = Observers()
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

    @property
    def num_workers(self) -> int:
        """Number of workers, m: each rank is one."""
        return dist.get_world_size()

    @property
    def quarantined(self) -> frozenset[int]:
        """Indices of the workers whose rows are dropped in every step; see :meth:`quarantine`."""
        return self._quarantine.workers

    def observe(self, observer: Callable[[Report], None]) -> RemovableHandle:
        """Call a function with the :class:`~lightning_byzantine.aggregators.Report` of every aggregation.

        It is called during backward, on every rank alike, and never with a single worker.

        Args:
            observer: takes the report.

        Returns:
            A handle, whose ``remove()`` ends the calls.

        """
        return self._observers.add(observer)

    def quarantine(self, workers: Iterable[int], *, proved: bool = False) -> None:
        """Drop the rows of these workers, in addition to those in quarantine, from the next step on.

        Must be called on all ranks.

        Args:
            workers: indices.
            proved: whether there is proof that all of them are faulty, so that f is reduced by one for each; see
                :class:`~lightning_byzantine.aggregation.quarantine.Quarantine`.

        Raises:
            ValueError: if the indices are wrong, or the rule does not support the remaining workers.

        """
        self._quarantine.add(workers, self.aggregator, self.num_workers, self.num_byzantine, proved=proved)
        if self._witnesses is not None:
            self._witnesses.exclude(self._quarantine.proved)

    def add_attack(self, attack: Attack, workers: Sequence[int]) -> None:
        """Simulate an attack from now on: replace what these workers send, on every rank.

        Must be called on all ranks.

        Args:
            attack: what they do. Its state is not in :meth:`state_dict`.
            workers: their indices.

        Raises:
            TypeError: if it is no attack on vectors.
            ValueError: unless the indices are one or more different workers that leave an honest one.

        """
        if not isinstance(attack, Attack) or not attack.on_vectors:
            raise TypeError(
                f"attack must be an Attack on what workers send, such as SignFlip(), got {attack!r}. One on data can"
                " poison the batches in your loop: `batch = attack.poison(batch)`."
            )
        attack.bind(self.aggregator, self.num_byzantine)
        attack.check(self.num_workers, workers)
        if len(workers) > self.num_byzantine and dist.get_rank() == 0:
            warnings.warn(
                f"This attack makes {len(workers)} workers Byzantine, more than num_byzantine={self.num_byzantine}"
                " allows for: no rule can be expected to survive.",
                stacklevel=2,
            )
        self._engine.add_attack(lambda matrix: attack.tamper(matrix, workers))

    def synchronize_buffers(self) -> None:
        """Let all ranks vote on buffers now instead of before the next forward, such as after the last step.

        Must be called on all ranks. :meth:`state_dict` does it as well.
        """
        if self._buffers is not None:
            self._buffers.synchronize()

    def state_dict(self) -> dict[str, Any]:
        """Return the state of all workers' estimators, of the rule and of the quarantine; empty except on rank 0.

        Must be called on all ranks, which vote on buffers first, in place. For an exact resume, save it on rank 0
        together with the states of the model and the optimizer, and load it on all ranks.
        """
        self.synchronize_buffers()
        state = self._states().save(alone=False)
        state |= {"quarantined": sorted(self.quarantined), "quarantined_by_proof": sorted(self._quarantine.proved)}
        return state if dist.get_rank() == 0 else {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore what :meth:`state_dict` returned on rank 0; must be called on all ranks.

        Those in quarantine now stay there.

        Raises:
            ValueError: if it is another rank's, or of another number of workers, another estimator, or a rule with
                other state.

        """
        if not state:
            raise ValueError(
                "state must be what `state_dict` has returned on rank 0, got the empty one of another rank"
            )
        self._states().load(state)
        for workers, proved in ((state["quarantined_by_proof"], True), (state["quarantined"], False)):
            if workers:
                self.quarantine(workers, proved=proved)

    def _aggregation(self) -> Aggregation:
        if self.num_workers == 1 and (self.estimator is None or self.estimator.transparent):
            return SingleWorker()
        return RobustAggregation(self.aggregator, self.num_byzantine, self._quarantine, self._observers)

    def _exclude(self, ranks: Collection[int]) -> None:
        """Drop the rows of ranks that are proved to have told others different things, and report them."""
        self._observers.note_equivocated(ranks)
        with rank_errors(ranks):
            self.quarantine(ranks, proved=True)

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
