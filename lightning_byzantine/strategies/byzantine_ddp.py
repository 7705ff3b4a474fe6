"""The Lightning strategy: DDP with a robust rule instead of the mean."""

from collections import OrderedDict
from collections.abc import Callable, Collection, Iterable
from contextlib import nullcontext
from typing import Any, Literal

import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import Trainer
from lightning.pytorch.utilities import rank_zero_warn
from lightning.pytorch.utilities.types import STEP_OUTPUT
from torch import Tensor
from torch.optim import Optimizer
from torch.utils.hooks import RemovableHandle
from typing_extensions import override

from lightning_byzantine.aggregation.aggregation import Aggregation, SingleWorker
from lightning_byzantine.aggregation.defaults import estimator_or_default
from lightning_byzantine.aggregation.divided_states import DividedStates
from lightning_byzantine.aggregation.gradients import flat_size
from lightning_byzantine.aggregation.quarantine import rank_errors
from lightning_byzantine.aggregation.robust_aggregation import RobustAggregation
from lightning_byzantine.aggregation.shadow_aggregation import ShadowAggregation
from lightning_byzantine.aggregation.slices import Slices
from lightning_byzantine.aggregation.sparse_gradients import sparse_parameters
from lightning_byzantine.aggregation.worker_states import WorkerStates
from lightning_byzantine.aggregators import Aggregator
from lightning_byzantine.estimators import Estimator, WorkerMomentum
from lightning_byzantine.exchange import Exchange, make_exchange
from lightning_byzantine.exchange.torch_internals import _set_pg_timeout
from lightning_byzantine.exchange.worker_groups import groups_of_workers
from lightning_byzantine.optim import DoubleMomentum
from lightning_byzantine.strategies import nodes
from lightning_byzantine.strategies.aggregating_ddp import AggregatingDDP
from lightning_byzantine.strategies.audits.audits import Audits, check_auditable
from lightning_byzantine.strategies.audits.verdict import Verdict
from lightning_byzantine.strategies.lightning_internals import _DDPForwardRedirection, _optimizer_to_device
from lightning_byzantine.strategies.robust_strategy import RobustStrategy
from lightning_byzantine.strategies.second_pass.redirection import PreviousPointRedirection
from lightning_byzantine.strategies.second_pass.wrapping import find_or_wrap
from lightning_byzantine.utilities.checks import check_choice, check_worker_indices

__all__ = ["ByzantineDDPStrategy"]

_CHECKPOINT_KEY = "byzantine_ddp"


class ByzantineDDPStrategy(RobustStrategy, AggregatingDDP):
    """DDP that survives Byzantine workers: gradients are gathered and aggregated by a robust rule, not averaged.

    Every rank is one worker, or several; see ``workers_per_process``. It sends an estimate of the gradient, receives
    those of all others, and applies the same rule to the same rows, so that parameters stay bit-identical without
    trusting any rank's values; ``exchange`` has a cheaper option that trusts more.

    Args:
        aggregator: the rule. None for ``PersistentFilter()``.
        num_byzantine: number of the m workers that may be Byzantine, f < m / 2. None for the largest such f.
        estimator: what a worker sends. "auto" for ``WorkerMomentum(beta=0.9, transparent=True)``, which does not change
            the gradient under the rule ``Mean``; None for raw gradients. ``DoubleMomentumEstimator()`` wraps the
            optimizer in ``DoubleMomentum``, unless ``configure_optimizers`` has done so; "auto" then uses the
            optimizer's own estimator.
        max_worker_grad_norm: clips each worker's raw gradient to this norm, before the estimator. None for no clipping.
        exchange: "all_gather" for every rank to aggregate for itself, without trusting others; "all_to_all" for every
            rank to aggregate its share of the columns, which trusts it with them, at the traffic of a ring all-reduce.
        workers: "rank", or "node" for all processes of a node to be one worker: its vector is the mean of their
            gradients, of which each exchanges its part with the processes of the same local rank on other nodes, who
            are believed to send all others the same.
        workers_per_process: number of workers that each process acts as, k, so that m is k times the number of
            processes: batch j of an epoch belongs to the process's worker j mod k, and ``accumulate_grad_batches``
            becomes k if it is 1. Fewer than k batches at the end of an epoch are dropped.
        shadow: train with the plain mean, as stock DDP does, and apply the rule for its reports only, which
            :class:`~lightning_byzantine.callbacks.ByzantineMonitor` shows.
        on_breakdown: what to do when more workers send non-finite vectors than ``num_byzantine``: "raise" an error that
            names them, "skip" the optimizer step, or "propagate" the plain mean, as stock DDP does. A gradient scaler,
            if there is one, skips the step instead.
        max_skips: maximum number of consecutive skipped steps; one more raises the error.
        restart_estimator: ignore the estimator's and the rule's state when resuming from a checkpoint. Needed when the
            number of workers has changed.
        **kwargs: arguments of :class:`~lightning_byzantine.strategies.fault_tolerant_ddp.FaultTolerantDDP`, of
            :class:`~lightning.pytorch.strategies.DDPStrategy` and of
            :class:`~torch.nn.parallel.DistributedDataParallel`.

    Attributes:
        quarantined: indices of workers whose rows are dropped in every step; see :meth:`quarantine`.

    Raises:
        TypeError: if the aggregator is not an Aggregator, or the estimator not an Estimator.
        ValueError: if the exchange, ``workers`` or ``on_breakdown`` is unknown, or ``workers_per_process`` or
            ``max_skips`` under 1; and when the Trainer is created, if f is not under m / 2, or the aggregator does not
            support m and f.
        MisconfigurationException: if another communication hook is given, or an argument with which gradients bypass
            this one, or one that does not go with ``workers="node"``, or with that there is a single node, or the
            accelerator is neither CPU nor CUDA; and when fit starts, if ``accumulate_grad_batches`` is neither 1 nor a
            multiple of ``workers_per_process``.

    Example:
        >>> from lightning.pytorch import Trainer
        >>> from lightning_byzantine.aggregators import CTMA, GeometricMedian
        >>> strategy = ByzantineDDPStrategy(aggregator=CTMA(base=GeometricMedian()), num_byzantine=2)
        >>> trainer = Trainer(strategy=strategy, accelerator="cpu", devices=5, logger=False)
        >>> Trainer(strategy=ByzantineDDPStrategy(num_byzantine=2), accelerator="cpu", devices=4, logger=False)
        Traceback (most recent call last):
        ...
        ValueError: num_byzantine must satisfy 0 <= f < m / 2, got f=2 with m=4 workers

    """

    def __init__(
        self,
        aggregator: Aggregator | None = None,
        num_byzantine: int | None = None,
        estimator: Estimator | Literal["auto"] | None = "auto",
        max_worker_grad_norm: float | None = None,
        exchange: Literal["all_gather", "all_to_all"] = "all_gather",
        workers: Literal["rank", "node"] = "rank",
        workers_per_process: int = 1,
        shadow: bool = False,
        on_breakdown: Literal["raise", "skip", "propagate"] = "raise",
        max_skips: int = 10,
        restart_estimator: bool = False,
        **kwargs: Any,
    ) -> None:
        super().__init__(
            aggregator=aggregator,
            num_byzantine=num_byzantine,
            estimator=estimator,
            max_worker_grad_norm=max_worker_grad_norm,
            exchange=exchange,
            on_breakdown=on_breakdown,
            max_skips=max_skips,
            restart_estimator=restart_estimator,
            workers_per_process=workers_per_process,
            **kwargs,
        )
        self.shadow = shadow
        self.workers = check_choice("workers", workers, ("rank", "node"))
        if self.workers == "node":
            nodes.check_arguments(
                self.aggregator,
                {
                    "workers_per_process": workers_per_process if workers_per_process > 1 else 0,
                    "shadow": shadow,
                    "check_consistency_every_n_steps": self._check_every,
                },
            )
            nodes.check_estimator(self.estimator)
        self._check_shadow()
        self._asked_for_estimator = estimator
        self._slices: Slices | None = None
        self._audits: Audits | None = None
        self._verdict_observers: dict[int, Callable[[Verdict], None]] = OrderedDict()

    @property
    @override
    def num_workers(self) -> int:
        """Number of workers of all processes, m."""
        return self.num_nodes if self.workers == "node" else super().num_workers

    @override
    def quarantine(self, workers: Iterable[int], *, proved: bool = False) -> None:
        if self.shadow:
            raise MisconfigurationException("Shadow mode trains as stock DDP does, and so can't quarantine workers.")
        super().quarantine(workers, proved=proved)
        self._take_votes_away()

    @override
    def audit(self, worker: int) -> None:
        self.check_audits()
        check_worker_indices("worker", [worker], self.num_workers)
        assert self._audits is not None
        self._audits.announce(worker)

    @override
    def check_audits(self) -> None:
        if self.workers == "node":
            raise MisconfigurationException(
                "Audits compute a worker's step once more on each other rank, which needs workers='rank'."
            )
        check_auditable(self._module, self.num_workers)

    @override
    def observe_verdicts(self, observer: Callable[[Verdict], None]) -> RemovableHandle:
        handle = RemovableHandle(self._verdict_observers)
        self._verdict_observers[handle.id] = observer
        return handle

    @override
    def training_step(self, *args: Any, **kwargs: Any) -> STEP_OUTPUT:
        with nullcontext() if self._audits is None else self._audits.captured():
            return super().training_step(*args, **kwargs)

    @override
    def optimizer_step(self, optimizer: Optimizer, closure: Callable[[], Any], *args: Any, **kwargs: Any) -> Any:
        def audited() -> Any:
            loss = closure()
            # Here the parameters are still those of the gradients that were exchanged.
            if self._audits is not None and self._audits.is_due:
                self._watched(self._audits.step, "an audit")()
            return loss

        return super().optimizer_step(optimizer, audited, *args, **kwargs)

    @override
    def setup_environment(self) -> None:
        super().setup_environment()
        self._take_votes_away()

    @override
    def _exclude(self, ranks: Collection[int]) -> None:
        super()._exclude(ranks)
        if not self.shadow:
            with rank_errors(ranks):
                self.quarantine(self._workers_of(ranks), proved=True)

    def _take_votes_away(self) -> None:
        """Listen no more to ranks of which all workers are proved to be faulty."""
        if self._witnesses is not None:
            faulty = [r for r in range(self.world_size) if self._quarantine.proved.issuperset(self._workers_of([r]))]
            self._witnesses.exclude(faulty)

    @override
    def set_world_ranks(self) -> None:
        if self.workers == "node":
            nodes.check_num_nodes(self.num_nodes, self.num_nodes * self.num_processes)
        super().set_world_ranks()
        # Not `root_device`: a process may have a local rank for which there is no device, and not train.
        for kind in {device.type for device in self.parallel_devices or ()} - {"cpu", "cuda"}:
            raise MisconfigurationException(
                f"{type(self).__name__} runs where DDP runs, on accelerator='cpu' or 'cuda', got a device of type"
                f" {kind!r}"
            )

    @override
    def setup_optimizers(self, trainer: Trainer) -> None:
        super().setup_optimizers(trainer)
        self._set_up_estimator(trainer)
        self._check_shadow()
        if self.estimator is not None:
            self.estimator.reset()
        self.aggregator.reset()
        self._slices = self._slices_of_nodes() if self.workers == "node" else None
        aggregation, exchange = self._aggregation(), self._exchange()
        self.aggregate_by(aggregation, exchange, self.estimator, self._max_worker_grad_norm, self._slices)
        self._set_up_audits(self.estimator if aggregation.takes_estimates else None)

    @override
    def teardown(self) -> None:
        for optimizer in self.optimizers:
            if isinstance(optimizer, DoubleMomentum):
                _optimizer_to_device(optimizer.base, torch.device("cpu"))
                optimizer.take_back()
        self._forward_redirection = _DDPForwardRedirection()
        self._audits = None
        super().teardown()  # the slices stay, for a checkpoint after fit

    @override
    def shared_state(self) -> dict[str, Any]:
        return super().shared_state() | {
            "estimator": {} if self.estimator is None else self.estimator.shared_state(),
            "aggregator": self.aggregator.state_dict(),
        }

    @override
    def load_shared_state(self, state: dict[str, Any]) -> None:
        super().load_shared_state(state)
        if self.estimator is not None:
            self.estimator.load_shared_state(state["estimator"])
        self.aggregator.load_state_dict(state["aggregator"])

    @override
    def save_checkpoint(self, checkpoint: dict[str, Any], filepath: Any, storage_options: Any | None = None) -> None:
        # Not in checkpoints of weights only, nor in the parent process of spawned ranks.
        if "optimizer_states" in checkpoint and torch.distributed.is_initialized():
            save, alone = self._states().save, self._has_failed()
            if not alone:
                save = self._watched(save, "the gathering of states for a checkpoint")
            checkpoint[_CHECKPOINT_KEY] = save(alone=alone) | self._counts()
        super().save_checkpoint(checkpoint, filepath, storage_options)

    @override
    def load_optimizer_state_dict(self, checkpoint: Any) -> None:
        state = checkpoint.get(_CHECKPOINT_KEY, {})
        self._load_counts(state)
        if state and not self.restart_estimator:
            self._states().load(state)
        elif not self.restart_estimator:
            rank_zero_warn(
                f"The checkpoint was not written by {type(self).__name__}, so the estimator and the aggregator start"
                " from zero."
            )
        super().load_optimizer_state_dict(checkpoint)

    def _exchange(self) -> Exchange:
        """Return the exchange for the strategy's arguments."""
        if self._slices is not None:
            return make_exchange(self.exchange, self.num_workers, None, self._slices.shards)
        # In shadow mode, gradients are averaged as by stock DDP, whatever they are.
        return make_exchange(self.exchange, self.world_size, None if self.shadow else self._witnesses)

    def _slices_of_nodes(self) -> Slices:
        nodes.check_estimator(self.estimator)  # `configure_optimizers` may have chosen another one
        shards = groups_of_workers(self.root_device.type, self.num_nodes)
        for group in (shards.across, shards.within):
            if self._timeout is not None:
                _set_pg_timeout(self._timeout, group)
        return Slices({name: flat_size(parameter) for name, parameter in self._module.named_parameters()}, shards)

    def _aggregation(self) -> Aggregation:
        """Return the aggregation for the strategy's arguments."""
        if self.num_workers == 1 and (self.estimator is None or self.estimator.transparent):
            return SingleWorker()
        if self.shadow:
            beta = 0.0 if self.estimator is None else self.estimator.memory
            return ShadowAggregation(self.aggregator, self.num_byzantine, beta, self._observers)
        self._check_sparse()
        return RobustAggregation(self.aggregator, self.num_byzantine, self._quarantine, self._observers)

    def _set_up_estimator(self, trainer: Trainer) -> None:
        """Use double momentum in both the estimator and the optimizer, or in neither."""
        asked_for = self._asked_for_estimator
        self.estimator = estimator_or_default(asked_for)
        optimizer = find_or_wrap(trainer.lightning_module, self.optimizers, asked_for, self.precision_plugin)
        if optimizer is None:
            return
        self.optimizers = [optimizer]
        self.estimator = optimizer.estimator
        optimizer.receives_estimates = True
        assert self.window is not None
        self._forward_redirection = PreviousPointRedirection(
            optimizer, self._max_worker_grad_norm, self._loss_scale, self.window
        )

    def _set_up_audits(self, estimator: Estimator | None) -> None:
        try:
            self.check_audits()
        except MisconfigurationException:  # whoever asks for an audit gets the reason
            return
        assert self.engine is not None
        assert self.window is not None
        double = [optimizer for optimizer in self.optimizers if isinstance(optimizer, DoubleMomentum)]
        self._audits = Audits(
            self._module,
            self.engine,
            self.window,
            estimator,
            # Ranks may be fewer than workers.
            min(self.num_byzantine, (self.world_size - 1) // 2),
            is_sharded=self.exchange == "all_to_all" and self.world_size > 1,
            optimizer=double[0] if double else None,
            max_norm=self._max_worker_grad_norm,
            loss_scale=self._loss_scale,
            gather=self._agreed_rows,
            quarantined=lambda: self.quarantined,
            tell=self._tell_verdict,
        )

    def _agreed_rows(self, tensor: Tensor) -> dict[int, Tensor]:
        rows = self._voters.gather(tensor.to(self.root_device)).cpu()
        return dict(zip(self._voters.ranks(), rows, strict=True))

    def _tell_verdict(self, verdict: Verdict) -> None:
        for observer in list(self._verdict_observers.values()):  # one of them may remove itself
            observer(verdict)

    def _check_shadow(self) -> None:
        if self.shadow and not isinstance(self.estimator, WorkerMomentum | None):
            raise MisconfigurationException(
                "With shadow=True the run is one of stock DDP, and the rule sees the momentum of raw gradients, got"
                f" estimator={self.estimator!r}. Use WorkerMomentum() or None."
            )

    def _check_sparse(self) -> None:
        for name in sparse_parameters(self._module):
            raise MisconfigurationException(
                f"The gradient of the parameter {name!r} is sparse, but the aggregation needs whole vectors: workers'"
                " momentum has values in every row. Make its module with sparse=False, with an optimizer such as Adam"
                " instead of SparseAdam. With shadow=True, sparse gradients are averaged as by stock DDP."
            )

    def _states(self) -> WorkerStates:
        (first, *others) = self._workers_of([self.global_rank])
        own = range(first, first + 1 + len(others))
        parameters = dict(self._module.named_parameters())
        remedy = (
            "reset the estimators and the aggregator with `restart_estimator=True` among the strategy's arguments, here"
            f" `ByzantineDDPStrategy(..., estimator={self.estimator!r}, restart_estimator=True)`."
        )
        arguments = parameters, self.aggregator, self.estimator, own, self.num_workers, self.root_device, remedy
        if self._slices is None:
            return WorkerStates(*arguments)
        return DividedStates(*arguments, self._slices, self._slices.shards)
