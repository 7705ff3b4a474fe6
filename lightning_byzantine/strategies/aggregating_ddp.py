"""DDP whose gradients go through an aggregation engine."""

from abc import ABC
from collections.abc import Callable
from typing import Any

from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import Trainer
from lightning.pytorch.plugins.precision import MixedPrecision
from lightning.pytorch.utilities import rank_zero_warn
from lightning.pytorch.utilities.types import STEP_OUTPUT
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim import Optimizer
from typing_extensions import override

from lightning_byzantine.aggregation.aggregation import Aggregation
from lightning_byzantine.aggregation.breakdown import Breakdown
from lightning_byzantine.aggregation.ddp_hook import AggregationHook
from lightning_byzantine.aggregation.engine import AggregationEngine
from lightning_byzantine.aggregation.node_hook import NodeHook
from lightning_byzantine.aggregation.slices import Slices
from lightning_byzantine.estimators import Estimator
from lightning_byzantine.exchange import Exchange
from lightning_byzantine.exchange.collectives import gather_rows
from lightning_byzantine.exchange.signature import Signature
from lightning_byzantine.strategies.accumulation_window import AccumulationWindow
from lightning_byzantine.strategies.fault_tolerant_ddp import FaultTolerantDDP
from lightning_byzantine.strategies.skipped_steps import SkippedSteps
from lightning_byzantine.utilities.checks import check_integer_at_least

__all__ = ["AggregatingDDP"]

# Arguments of DDPStrategy and DistributedDataParallel with which gradients would bypass the aggregation.
_DETOURS = (
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


class AggregatingDDP(FaultTolerantDDP, ABC):
    """DDP in which every process acts as one worker or several, and an engine aggregates their gradients.

    A subclass defines what is sent, how it is aggregated, and what to do when more workers send unusable vectors than
    may be Byzantine, and calls :meth:`aggregate_by` before training starts.

    Args:
        workers_per_process: number of workers that each process acts as, k.
        **kwargs: arguments of FaultTolerantDDP.

    Attributes:
        engine: aggregates the gradients, during ``fit``.
        window: which worker a batch belongs to, during ``fit``.

    Raises:
        MisconfigurationException: if gradients would bypass the aggregation with an argument of DDP.

    """

    _breakdown: Breakdown
    _skipped_steps: SkippedSteps

    def __init__(self, workers_per_process: int, **kwargs: Any) -> None:
        for name in _DETOURS:
            if kwargs.get(name):
                raise MisconfigurationException(
                    f"{type(self).__name__} aggregates all gradients of all ranks in DDP's only communication hook, so"
                    f" it can't take `{name}`, got {name}={kwargs[name]!r}. Leave it out, or use `strategy='ddp'`."
                )
        super().__init__(**kwargs)
        self.workers_per_process = check_integer_at_least("workers_per_process", workers_per_process, 1)
        self.engine: AggregationEngine | None = None
        self.window: AccumulationWindow | None = None
        self._unknown_to_ddp: dict[str, nn.Parameter] = {}

    @property
    @override
    def num_workers(self) -> int:
        """Number of workers of all processes, m."""
        return self.world_size * self.workers_per_process

    def aggregate_by(
        self,
        aggregation: Aggregation,
        exchange: Exchange,
        estimator: Estimator | None,
        max_norm: float | None,
        slices: Slices | None,
    ) -> None:
        """Aggregate the gradients of this ``fit`` with an engine, which has the same arguments.

        With slices, workers are nodes.
        """
        assert isinstance(self.model, DistributedDataParallel)
        self.engine = AggregationEngine(
            dict(self._module.named_parameters()),
            aggregation,
            exchange,
            estimator,
            max_norm=max_norm,
            num_local_workers=self.workers_per_process,
            loss_scale=self._loss_scale,
            breakdown=self._breakdown,
            on_skip=self._skipped_steps.skip,
        )
        if slices is None:
            AggregationHook(self.engine, self._module).register(self.model)
        else:
            NodeHook(self.engine, self._module, slices).register(self.model)

    @override
    def setup_optimizers(self, trainer: Trainer) -> None:
        # Before the optimizers: their schedules may depend on `accumulate_grad_batches`, which the window may change.
        self.window = AccumulationWindow(trainer, self.workers_per_process)
        self._skipped_steps = SkippedSteps(trainer, self._breakdown)
        super().setup_optimizers(trainer)

    @override
    def configure_ddp(self) -> None:
        self._check_ignored()
        if self.world_size > 1 and self._ddp_kwargs.get("broadcast_buffers", True):
            # DDP copies rank 0's buffers, and the process would be aborted if another rank's are larger or smaller.
            own = {name: buffer for name, buffer in self._module.named_buffers() if name not in self._ignored}
            Signature(own).check_same(self._watched(gather_rows, "the comparison of buffers"), self.root_device)
        super().configure_ddp()

    @override
    def _register_ddp_hooks(self) -> None:
        # Lightning registers hooks on CUDA only. Ours needs the optimizers, and is registered in setup_optimizers. The
        # parameters that DDP has just ignored are known here.
        parameters = self._module.named_parameters()
        self._unknown_to_ddp = {name: parameter for name, parameter in parameters if not parameter.requires_grad}

    @override
    def training_step(self, *args: Any, **kwargs: Any) -> STEP_OUTPUT:
        for name, parameter in self._unknown_to_ddp.items():
            if parameter.requires_grad:
                raise MisconfigurationException(
                    f"The parameter {name!r} was frozen when DDP was set up, so its gradient would bypass the"
                    " aggregation now. Freeze in `on_fit_start`, and use find_unused_parameters=True. A callback that"
                    " derives from BaseFinetuning freezes in `setup`, too early: override `setup` to do nothing, and"
                    " `on_fit_start` to call `self.freeze_before_training(pl_module)` first."
                )
        return super().training_step(*args, **kwargs)

    @override
    def backward(self, closure_loss: Tensor, optimizer: Optimizer | None, *args: Any, **kwargs: Any) -> Tensor:
        assert self.engine is not None
        assert isinstance(self.model, DistributedDataParallel)
        so_far = self.engine.num_aggregated
        if self.workers_per_process == 1:
            loss = super().backward(closure_loss, optimizer, *args, **kwargs)
        else:
            loss = self._backward_of_one_worker(closure_loss, optimizer, *args, **kwargs)
        if self.model.require_backward_grad_sync and self.engine.num_aggregated == so_far:
            self._check_reached()
        return loss

    def _check_reached(self) -> None:
        """Raise an error after a backward pass that has not reached DDP's last bucket, if that was its purpose."""
        if self._module.automatic_optimization:
            raise RuntimeError(
                "The backward pass has not reached all parameters, so no gradients were aggregated. If some do not take"
                " part in every step, use find_unused_parameters=True."
            )
        if self._watch is not None:
            self._watch.retract()

    def _backward_of_one_worker(self, loss: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        assert self.engine is not None
        assert self.window is not None
        assert isinstance(self.model, DistributedDataParallel)
        gradients = self.engine.local
        if self.window.position == 0:
            gradients.begin()
        gradients.worker = self.window.worker
        if self.model.require_backward_grad_sync:
            gradients.give_back()
            if self.model.find_unused_parameters:
                gradients.define()
        # Lightning divides by the number of batches of all workers together.
        loss = super().backward(loss * self.workers_per_process, *args, **kwargs)
        if not self.model.require_backward_grad_sync:
            gradients.take()
        return loss

    @override
    def optimizer_step(self, optimizer: Optimizer, closure: Callable[[], Any], *args: Any, **kwargs: Any) -> Any:
        assert self.window is not None
        if self.window.is_complete:
            return self._skipped_steps.step(super().optimizer_step, optimizer, closure, *args, **kwargs)
        rank_zero_warn(
            f"The epoch has ended after {self.window.position + 1} of workers_per_process={self.workers_per_process}"
            " batches, which are dropped, because some workers have none. `limit_train_batches` can end it earlier."
        )
        with self.block_backward_sync():
            return closure()

    @override
    def teardown(self) -> None:
        if self.window is not None:
            self.window.restore()
        self.engine = self.window = None
        vars(self).pop("_skipped_steps", None)  # knows the Trainer
        super().teardown()

    @property
    def _ignored(self) -> frozenset[str]:
        """Names of parameters and buffers that DDP is told to ignore, by an attribute that it reads from the module."""
        return frozenset(getattr(self._module, "_ddp_params_and_buffers_to_ignore", ()))

    def _check_ignored(self) -> None:
        trainable = (name for name, parameter in self._module.named_parameters() if parameter.requires_grad)
        for name in self._ignored.intersection(trainable):
            raise MisconfigurationException(
                f"The module lets DDP ignore its parameter {name!r}, so its gradient would bypass the aggregation, and"
                " every rank would train another one. Remove it from `_ddp_params_and_buffers_to_ignore`, or freeze it."
            )

    def _loss_scale(self) -> float | None:
        """Return the factor that a gradient scaler has multiplied the loss by; None without one."""
        precision = self.precision_plugin
        if isinstance(precision, MixedPrecision) and precision.scaler is not None and precision.scaler.is_enabled():
            return float(precision.scaler.get_scale())
        return None
