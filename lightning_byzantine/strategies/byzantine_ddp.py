"""The Lightning strategy: DDP with a robust rule in the place of the mean."""

from collections import Counter, OrderedDict
from collections.abc import Callable, Iterable
from dataclasses import replace
from functools import partial
from itertools import chain
from typing import Any, Literal

import lightning.pytorch as pl
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.fabric.utilities.optimizer import _optimizer_to_device
from lightning.pytorch import Trainer
from lightning.pytorch.plugins.precision import MixedPrecision
from lightning.pytorch.strategies.ddp import _DDPForwardRedirection
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities import rank_zero_warn
from lightning.pytorch.utilities.types import STEP_OUTPUT
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim import Optimizer
from torch.utils.hooks import RemovableHandle
from typing_extensions import override

from lightning_byzantine.aggregation.breakdown import Breakdown
from lightning_byzantine.aggregation.ddp_hook import AggregationHook
from lightning_byzantine.aggregation.shadow import Shadow
from lightning_byzantine.aggregators import CTMA, NNM, Aggregator, GeometricMedian
from lightning_byzantine.aggregators.report import Report
from lightning_byzantine.errors import ByzantineBreakdownError
from lightning_byzantine.estimators import Estimator, WorkerMomentum
from lightning_byzantine.estimators.estimator import keep
from lightning_byzantine.exchange.exchange import AllGather, AllToAll, Exchange
from lightning_byzantine.matrix import WorkerMatrix
from lightning_byzantine.optim import DoubleMomentum
from lightning_byzantine.strategies.accumulation_window import AccumulationWindow
from lightning_byzantine.strategies.fault_tolerant_ddp import FaultTolerantDDP
from lightning_byzantine.strategies.second_pass.redirection import PreviousPointRedirection
from lightning_byzantine.strategies.second_pass.wrapping import find_or_wrap
from lightning_byzantine.strategies.worker_states import WorkerStates
from lightning_byzantine.utilities.checks import (
    check_choice,
    check_integer_at_least,
    check_positive,
    check_worker_indices,
)

__all__ = ["ByzantineDDPStrategy"]

_CHECKPOINT_KEY = "byzantine_ddp"

_EXCHANGES: dict[str, Callable[[int], Exchange]] = {"all_gather": AllGather, "all_to_all": AllToAll}

# Arguments of DDPStrategy and DistributedDataParallel by which gradients would go around the aggregation.
_REFUSED = (
    "ddp_comm_hook",
    "ddp_comm_state",
    "ddp_comm_wrapper",
    "delay_all_reduce_named_params",
    "device_mesh",
    "mixed_precision",
    "model_averaging_period",
    "param_to_hook_all_reduce",
    "process_group",
    "skip_all_reduce_unused_params",
)


# Counting bits takes longer than all else that observers are told, and a fault in a chip stays.
_BITS_EVERY_N_STEPS = 10


class ByzantineDDPStrategy(FaultTolerantDDP):
    """DDP that survives Byzantine workers: gradients are gathered and aggregated by a robust rule, not averaged.

    Every rank is one worker, or several; see ``workers_per_process``. It sends an estimate of the gradient, receives
    those of all others, and applies the same rule to the same rows, so that parameters stay bit-identical without trust
    in any rank's values; see ``exchange`` for a cheaper way that trusts more.

    Args:
        aggregator: the rule. None for ``CTMA(base=NNM(base=GeometricMedian()))``.
        num_byzantine: how many of the m workers may be Byzantine, f < m / 2. None for the largest such f.
        estimator: what a worker sends. "auto" for ``WorkerMomentum(beta=0.9, transparent=True)``, which leaves the
            gradient as it is under the rule ``Mean``; None for raw gradients. With ``DoubleMomentumEstimator()`` the
            optimizer gets wrapped in ``DoubleMomentum``, unless ``configure_optimizers`` returns it wrapped already;
            then "auto" stands for what it was wrapped with.
        max_worker_grad_norm: clips each worker's raw gradient to this norm, before the estimator. None for no clipping.
        exchange: "all_gather" lets every rank aggregate for itself and trusts nobody's values; "all_to_all" lets every
            rank aggregate its share of the columns, at the traffic of a ring all-reduce, and trusts it with them.
        workers_per_process: how many workers each process acts as, k, so that m is k times the number of processes:
            batch j of an epoch is the process's worker j mod k's, and ``accumulate_grad_batches`` becomes k where it
            is 1. Batches at the end of an epoch that don't make a window of k are left out.
        shadow: train by the plain mean, as stock DDP does, and apply the rule for its reports only; see
            :class:`~lightning_byzantine.callbacks.ByzantineMonitor`, which shows them.
        on_breakdown: what to do when more workers send non-finite vectors than ``num_byzantine``: "raise" an error that
            names them, "skip" the optimizer's step, or "propagate" the plain mean, as stock DDP does. Under a
            gradient scaler, such a step is the scaler's business.
        max_skips: how many steps in a row may be skipped before the error is raised.
        restart_estimator: ignore the estimator's and the rule's state when a checkpoint is resumed from. Needed when
            the number of workers has changed.
        **kwargs: arguments of :class:`~lightning_byzantine.strategies.fault_tolerant_ddp.FaultTolerantDDP`, of
            :class:`~lightning.pytorch.strategies.DDPStrategy` and of
            :class:`~torch.nn.parallel.DistributedDataParallel`.

    Attributes:
        quarantined: indices of workers whose rows are dropped in every step; see :meth:`quarantine`.

    Raises:
        TypeError: if the aggregator is not an Aggregator, or the estimator not an Estimator.
        ValueError: if the exchange or ``on_breakdown`` is unknown, or ``workers_per_process`` or ``max_skips`` under 1;
            and when the Trainer is made, if f is not under m / 2, or the aggregator can't serve m and f.
        MisconfigurationException: if another communication hook is given, or an argument that takes gradients around
            this one, or the accelerator is neither CPU nor CUDA; and when fit starts, if ``accumulate_grad_batches`` is
            neither 1 nor a multiple of ``workers_per_process``.

    Example:
        >>> from lightning.pytorch import Trainer
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
        workers_per_process: int = 1,
        shadow: bool = False,
        on_breakdown: Literal["raise", "skip", "propagate"] = "raise",
        max_skips: int = 10,
        restart_estimator: bool = False,
        **kwargs: Any,
    ) -> None:
        for name in _REFUSED:
            if kwargs.get(name):
                raise MisconfigurationException(
                    f"{type(self).__name__} aggregates all gradients of all ranks in DDP's only communication hook, so"
                    f" it can't take `{name}`, got {name}={kwargs[name]!r}. Leave it out, or use `strategy='ddp'`."
                )
        super().__init__(**kwargs)
        self.aggregator = CTMA(NNM(GeometricMedian())) if aggregator is None else aggregator
        if not isinstance(self.aggregator, Aggregator):
            raise TypeError(f"aggregator must be an Aggregator, such as Krum(), got {aggregator!r}")
        if estimator != "auto" and not isinstance(estimator, Estimator | None):
            raise TypeError(f"estimator must be an Estimator, 'auto' or None, got {estimator!r}")
        self.estimator = WorkerMomentum() if estimator == "auto" else estimator
        if max_worker_grad_norm is not None:
            check_positive("max_worker_grad_norm", max_worker_grad_norm)
        check_choice("exchange", exchange, _EXCHANGES)
        check_integer_at_least("workers_per_process", workers_per_process, 1)
        self.exchange = exchange
        self.workers_per_process = workers_per_process
        self.shadow = shadow
        self._check_shadow()
        self.breakdown = Breakdown(on_breakdown, max_skips)
        self.quarantined: frozenset[int] = frozenset()
        self._observers: dict[int, Callable[[Report], None]] = OrderedDict()
        self.restart_estimator = restart_estimator
        self.hook: AggregationHook | None = None
        self.window: AccumulationWindow | None = None
        self._num_byzantine = num_byzantine
        self._previous: dict[str, Tensor] = {}
        self._aggregations: Counter[frozenset[str | None]] = Counter()
        self._unknown_to_ddp: dict[str, nn.Parameter] = {}
        self._given_estimator = self.estimator if estimator != "auto" else estimator
        self._max_worker_grad_norm = max_worker_grad_norm

    @property
    @override
    def num_workers(self) -> int:
        """Number of workers, m: all processes' together."""
        return self.world_size * self.workers_per_process

    @property
    def num_byzantine(self) -> int:
        """How many workers may be Byzantine, f."""
        return (self.num_workers - 1) // 2 if self._num_byzantine is None else self._num_byzantine

    @property
    def skipped_steps(self) -> int:
        """How many steps were skipped in the whole run, by ``on_breakdown="skip"``."""
        return self.breakdown.skipped

    def observe(self, observer: Callable[[Report], None]) -> RemovableHandle:
        """Have a function called with the :class:`~lightning_byzantine.aggregators.Report` of every aggregation.

        It is called during backward, on every rank. The unlikely bits are reported in every tenth aggregation of the
        same parameters.

        Args:
            observer: takes the report.

        Returns:
            A handle, whose ``remove()`` ends it.

        """
        handle = RemovableHandle(self._observers)
        self._observers[handle.id] = observer
        return handle

    def quarantine(self, workers: Iterable[int]) -> None:
        """Drop the rows of these workers from the next step on, beside those that are dropped already.

        ``num_byzantine`` falls by one for each. To be called on all ranks alike; the list is in the checkpoint.

        Args:
            workers: indices.

        Raises:
            MisconfigurationException: in shadow mode, which only watches.
            ValueError: if the indices are wrong, or the rule can't serve the workers that are left.

        """
        if self.shadow:
            raise MisconfigurationException("Shadow mode trains as stock DDP does, and so can't quarantine workers.")
        quarantined = self.quarantined | set(workers)
        check_worker_indices("workers", quarantined, self.num_workers)
        self.aggregator.check(self.num_workers - len(quarantined), max(0, self.num_byzantine - len(quarantined)))
        self.quarantined = frozenset(quarantined)

    @override
    def set_world_ranks(self) -> None:
        super().set_world_ranks()
        # The first moment at which the number of workers is known: while the Trainer is being made.
        self.aggregator.check(self.num_workers, self.num_byzantine)
        if self.parallel_devices and self.root_device.type not in ("cpu", "cuda"):
            raise MisconfigurationException(
                f"{type(self).__name__} runs where DDP runs, on accelerator='cpu' or 'cuda', got a device of type"
                f" {self.root_device.type!r}"
            )

    @override
    def setup(self, trainer: Trainer) -> None:
        if trainer.state.fn == TrainerFn.FITTING:
            self.window = AccumulationWindow(trainer, self.workers_per_process)
        super().setup(trainer)
        if trainer.state.fn == TrainerFn.FITTING and self.num_workers == 2:
            rank_zero_warn(
                "Two workers cannot outvote each other: byzantine_ddp withstands f < m / 2 Byzantine workers, which is"
                " f=0 with 2 workers. Use 3 workers or more."
            )

    @override
    def _register_ddp_hooks(self) -> None:
        # Lightning registers hooks on CUDA only. Ours waits for the optimizers, in setup_optimizers; what DDP has just
        # left out is known now.
        assert self.lightning_module is not None
        self._unknown_to_ddp = {
            name: parameter
            for name, parameter in self.lightning_module.named_parameters()
            if not parameter.requires_grad
        }

    @override
    def setup_optimizers(self, trainer: Trainer) -> None:
        super().setup_optimizers(trainer)
        self._set_up_estimator()
        self._check_shadow()
        assert isinstance(self.model, DistributedDataParallel)
        assert self.lightning_module is not None
        alone = self.num_workers == 1 and (self.estimator is None or self.estimator.transparent)
        if self.estimator is not None:
            self.estimator.reset()
        self._previous.clear()
        aggregate: Callable[[WorkerMatrix], list[Tensor]] = self._aggregate
        if alone:
            aggregate = _only_row
        elif self.shadow:
            beta = 0.0 if self.estimator is None else self.estimator.memory
            aggregate = partial(self._watch, Shadow(self.aggregator, beta))
        self.hook = AggregationHook(
            self.lightning_module,
            exchange=_EXCHANGES[self.exchange](self.world_size),
            aggregate=aggregate,
            estimator=None if alone or self.shadow else self.estimator,
            loss_scale=self._loss_scale,
            max_norm=self._max_worker_grad_norm,
            num_local_workers=self.workers_per_process,
            previous=self._previous if self.aggregator.uses_previous and not self.shadow else None,
            tolerates=self._tolerates,
        )
        self.hook.register(self.model)

    @override
    def training_step(self, *args: Any, **kwargs: Any) -> STEP_OUTPUT:
        for name, parameter in self._unknown_to_ddp.items():
            if parameter.requires_grad:
                raise MisconfigurationException(
                    f"The parameter {name!r} was frozen when DDP was set up, so its gradient would go around the"
                    " aggregation now. Freeze in `on_train_start`, and have find_unused_parameters=True."
                )
        return super().training_step(*args, **kwargs)

    @override
    def backward(self, closure_loss: Tensor, optimizer: Optimizer | None, *args: Any, **kwargs: Any) -> Tensor:
        if self.workers_per_process == 1:
            return super().backward(closure_loss, optimizer, *args, **kwargs)
        assert self.hook is not None
        assert self.window is not None
        assert isinstance(self.model, DistributedDataParallel)
        gradients = self.hook.gradients
        if self.window.position == 0:
            gradients.clear()
        gradients.worker = self.window.worker
        if self.model.find_unused_parameters and self.model.require_backward_grad_sync:
            gradients.define()
        # Lightning divides by the number of batches of all workers together.
        loss = super().backward(closure_loss * self.workers_per_process, optimizer, *args, **kwargs)
        if not self.model.require_backward_grad_sync:
            gradients.take()
        return loss

    @override
    def optimizer_step(
        self,
        optimizer: Optimizer,
        closure: Callable[[], Any],
        model: pl.LightningModule | nn.Module | None = None,
        **kwargs: Any,
    ) -> Any:
        def step(guarded: Callable[[], Any]) -> Any:
            return super(ByzantineDDPStrategy, self).optimizer_step(optimizer, guarded, model, **kwargs)

        assert self.window is not None
        if self.window.is_complete:
            return self.breakdown.step(optimizer, step, closure)
        rank_zero_warn(
            f"The epoch has ended after {self.window.position + 1} of workers_per_process={self.workers_per_process}"
            " batches, which are left out, since some workers have none. `limit_train_batches` can end it earlier."
        )
        with self.block_backward_sync():
            return closure()

    @override
    def teardown(self) -> None:
        # As Lightning does with optimizers: what is kept for a checkpoint after fit need not stay on the device.
        if self.window is not None:
            self.window.restore()
            self.window = None
        if self.estimator is not None:
            workers = [_to_cpu(state) for state in self._worker_states()]
            self.estimator.load_state(workers, _to_cpu(self.estimator.shared_state()))
        for optimizer in self.optimizers:
            if isinstance(optimizer, DoubleMomentum):
                _optimizer_to_device(optimizer.base, torch.device("cpu"))
                optimizer.take_back()
        self.hook = None
        self._forward_redirection = _DDPForwardRedirection()
        super().teardown()

    @override
    def shared_state(self) -> dict[str, Any]:
        return super().shared_state() | {
            "estimator": {} if self.estimator is None else self.estimator.shared_state(),
            "aggregator": self.aggregator.state_dict(),
            "previous": self._previous,
        }

    @override
    def load_shared_state(self, state: dict[str, Any]) -> None:
        super().load_shared_state(state)
        if self.estimator is not None:
            self.estimator.load_state(self._worker_states(), state["estimator"])
        self.aggregator.load_state_dict(state["aggregator"])
        keep(state["previous"], self._previous)

    @override
    def save_checkpoint(self, checkpoint: dict[str, Any], filepath: Any, storage_options: Any | None = None) -> None:
        # Not for weights only, nor in the process from which other start methods have spawned the ranks.
        if "optimizer_states" in checkpoint and torch.distributed.is_initialized():
            state = self._states().save(alone=self._is_interrupted())
            state |= {"quarantined": sorted(self.quarantined), "skipped": self.breakdown.skipped}
            checkpoint[_CHECKPOINT_KEY] = state
        super().save_checkpoint(checkpoint, filepath, storage_options)

    @override
    def load_optimizer_state_dict(self, checkpoint: Any) -> None:
        self._load_quarantine(checkpoint.get(_CHECKPOINT_KEY, {}))
        if self.restart_estimator:
            if self.estimator is not None:
                self.estimator.reset()
        elif _CHECKPOINT_KEY in checkpoint:
            self._states().load(checkpoint[_CHECKPOINT_KEY])
        else:
            rank_zero_warn(
                f"The checkpoint was not written by {type(self).__name__}, so the estimator and the aggregator start"
                " afresh."
            )
        super().load_optimizer_state_dict(checkpoint)

    def _set_up_estimator(self) -> None:
        """Have double momentum on both sides or on none: what workers send, and how the optimizer steps."""
        assert self.lightning_module is not None
        given = self._given_estimator
        self.estimator = WorkerMomentum() if given == "auto" else given
        optimizer = find_or_wrap(self.lightning_module, self.optimizers, given, self.precision_plugin)
        if optimizer is not None:
            self.optimizers = [optimizer]
            self.estimator = optimizer.estimator
            optimizer.receives_estimates = True
            assert self.window is not None
            self._forward_redirection = PreviousPointRedirection(
                optimizer, self._max_worker_grad_norm, self._loss_scale, self.window
            )

    def _worker_states(self) -> list[dict[str, Tensor]]:
        assert self.estimator is not None
        return [self.estimator.worker_state(worker) for worker in range(self.workers_per_process)]

    def _check_shadow(self) -> None:
        if self.shadow and not isinstance(self.estimator, WorkerMomentum | None):
            raise MisconfigurationException(
                "With shadow=True the run is one of stock DDP, and the rule sees the momentum of raw gradients, got"
                f" estimator={self.estimator!r}. Use WorkerMomentum() or None."
            )

    def _aggregate(self, matrix: WorkerMatrix) -> list[Tensor]:
        if self._is_turn_of_bits(matrix):
            pass
        workers = torch.tensor([index for index in range(matrix.num_workers) if index not in self.quarantined])
        trusted = matrix.select(workers) if self.quarantined else matrix
        num_byzantine = max(0, self.num_byzantine - len(self.quarantined))
        try:
            decision = self.aggregator.decide(trusted, num_byzantine)
        except ByzantineBreakdownError as error:
            dropped = error.workers
            self._tell(lambda: Report.of_breakdown(dropped, matrix.num_workers))
            if self.breakdown.policy == "propagate" and self._loss_scale() is None:
                return trusted.materialize(trusted.mean())
            raise
        self.breakdown.succeeded()
        self._tell(
            lambda: (
                decision.report().among(workers, matrix.num_workers, measurable=True)
                if self.quarantined
                else decision.report()
            )
        )
        return decision.values()

    def _tolerates(self, error: ByzantineBreakdownError) -> bool:
        tolerated = self.breakdown.tolerates(error, self.optimizers)
        if tolerated:
            assert self.lightning_module is not None
            trainer = self.lightning_module.trainer
            for logger in trainer.loggers:
                logger.log_metrics({"byzantine/skipped_steps": self.breakdown.skipped}, step=trainer.global_step)
        return tolerated

    def _watch(self, shadow: Shadow, matrix: WorkerMatrix) -> list[Tensor]:
        self._tell(lambda: shadow.report(matrix, self.num_byzantine, self._is_turn_of_bits(matrix)))
        # Not the rule Mean, which would drop what stock DDP lets through.
        return matrix.materialize(matrix.mean())

    def _is_turn_of_bits(self, matrix: WorkerMatrix) -> bool:
        if not self._observers:
            return False
        # Not the Trainer's step: of networks that take turns, it might only ever meet one.
        parameters = frozenset(chain.from_iterable(matrix.layout or ()))
        self._aggregations[parameters] += 1
        return self._aggregations[parameters] % _BITS_EVERY_N_STEPS == 1

    def _tell(self, report: Callable[[], Report]) -> None:
        if self._observers:
            made, outvoted = report(), self._take_outvoted()
            if outvoted is not None:
                outvoted[list(self.quarantined)] = False  # nothing is held against them any more
                made = replace(made, outvoted=outvoted)
            for observer in self._observers.values():
                observer(made)

    def _load_quarantine(self, state: dict[str, Any]) -> None:
        self.breakdown.skipped = state.get("skipped", 0)
        quarantined = state.get("quarantined", [])
        if quarantined and state["num_workers"] != self.num_workers:
            rank_zero_warn(
                f"The checkpoint has workers {quarantined} of {state['num_workers']} in quarantine. With"
                f" {self.num_workers} workers the indices mean others, so the quarantine is empty now."
            )
        elif quarantined and self.shadow:
            rank_zero_warn(f"The checkpoint has workers {quarantined} in quarantine, where shadow mode has nobody.")
        elif quarantined:
            self.quarantine(quarantined)

    def _loss_scale(self) -> float | None:
        plugin = self.precision_plugin
        if isinstance(plugin, MixedPrecision) and plugin.scaler is not None and plugin.scaler.is_enabled():
            return float(plugin.scaler.get_scale())
        return None

    def _states(self) -> WorkerStates:
        assert self.lightning_module is not None
        return WorkerStates(
            dict(self.lightning_module.named_parameters()),
            self.aggregator,
            self.estimator,
            self._previous,
            self.global_rank,
            self.world_size,
            self.workers_per_process,
            self.root_device,
        )


def _to_cpu(state: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: value.cpu() for name, value in state.items()}


def _only_row(matrix: WorkerMatrix) -> list[Tensor]:
    return [block[0] for block in matrix.blocks]
