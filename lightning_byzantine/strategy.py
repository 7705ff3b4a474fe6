"""The Lightning strategy: DDP with a robust rule in the place of the mean."""

from collections.abc import Callable
from typing import Any, Literal

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
from typing_extensions import override

from lightning_byzantine.aggregators import CTMA, NNM, Aggregator, CoordinateWiseMedian
from lightning_byzantine.checks import check_choice, check_positive
from lightning_byzantine.estimators import Estimator, WorkerMomentum
from lightning_byzantine.exchange import AllGather, AllToAll, Exchange
from lightning_byzantine.fault_tolerant_ddp import FaultTolerantDDP
from lightning_byzantine.hook import AggregationHook
from lightning_byzantine.matrix import WorkerMatrix
from lightning_byzantine.optim import DoubleMomentum
from lightning_byzantine.previous_point import PreviousPointRedirection
from lightning_byzantine.worker_states import WorkerStates
from lightning_byzantine.wrapping import find_or_wrap

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


class ByzantineDDPStrategy(FaultTolerantDDP):
    """DDP that survives Byzantine workers: gradients are gathered and aggregated by a robust rule, not averaged.

    Every rank is one worker. It sends an estimate of the gradient, receives those of all others, and applies the same
    rule to the same rows, so that parameters stay bit-identical without trust in any rank's values; see ``exchange``
    for a cheaper way that trusts more.

    Args:
        aggregator: the rule. None for ``CTMA(base=NNM(base=CoordinateWiseMedian()))``.
        num_byzantine: how many of the m workers may be Byzantine, f < m / 2. None for the largest such f.
        estimator: what a worker sends. "auto" for ``WorkerMomentum(beta=0.9, transparent=True)``, which leaves the
            gradient as it is under the rule ``Mean``; None for raw gradients. With ``DoubleMomentumEstimator()`` the
            optimizer gets wrapped in ``DoubleMomentum``, unless ``configure_optimizers`` returns it wrapped already;
            then "auto" stands for what it was wrapped with.
        max_worker_grad_norm: clips each worker's raw gradient to this norm, before the estimator. None for no clipping.
        exchange: "all_gather" lets every rank aggregate for itself and trusts nobody's values; "all_to_all" lets every
            rank aggregate 1/m of the columns, at the traffic of a ring all-reduce, and trusts it with them.
        restart_estimator: ignore the estimator's and the rule's state when a checkpoint is resumed from. Needed when
            the number of workers has changed.
        **kwargs: arguments of :class:`~lightning_byzantine.fault_tolerant_ddp.FaultTolerantDDP`, of
            :class:`~lightning.pytorch.strategies.DDPStrategy` and of
            :class:`~torch.nn.parallel.DistributedDataParallel`.

    Raises:
        TypeError: if the aggregator is not an Aggregator, or the estimator not an Estimator.
        ValueError: if the exchange is unknown; and when the Trainer is made, if f is not under m / 2, or the aggregator
            can't serve m and f.
        MisconfigurationException: if another communication hook is given, or an argument that takes gradients around
            this one, or the accelerator is neither CPU nor CUDA.

    Example:
        >>> from lightning.pytorch import Trainer
        >>> strategy = ByzantineDDPStrategy(aggregator=CTMA(base=CoordinateWiseMedian()), num_byzantine=2)
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
        self.aggregator = CTMA(NNM(CoordinateWiseMedian())) if aggregator is None else aggregator
        if not isinstance(self.aggregator, Aggregator):
            raise TypeError(f"aggregator must be an Aggregator, such as Krum(), got {aggregator!r}")
        if estimator != "auto" and not isinstance(estimator, Estimator | None):
            raise TypeError(f"estimator must be an Estimator, 'auto' or None, got {estimator!r}")
        self.estimator = WorkerMomentum() if estimator == "auto" else estimator
        if max_worker_grad_norm is not None:
            check_positive("max_worker_grad_norm", max_worker_grad_norm)
        check_choice("exchange", exchange, _EXCHANGES)
        self.exchange = exchange
        self.restart_estimator = restart_estimator
        self.hook: AggregationHook | None = None
        self._num_byzantine = num_byzantine
        self._unknown_to_ddp: dict[str, nn.Parameter] = {}
        self._given_estimator = self.estimator if estimator != "auto" else estimator
        self._max_worker_grad_norm = max_worker_grad_norm

    @property
    def num_byzantine(self) -> int:
        """How many workers may be Byzantine, f."""
        return (self.world_size - 1) // 2 if self._num_byzantine is None else self._num_byzantine

    @override
    def set_world_ranks(self) -> None:
        super().set_world_ranks()
        # The first moment at which the number of workers is known: while the Trainer is being made.
        self.aggregator.check(self.world_size, self.num_byzantine)
        if self.parallel_devices and self.root_device.type not in ("cpu", "cuda"):
            raise MisconfigurationException(
                f"{type(self).__name__} runs where DDP runs, on accelerator='cpu' or 'cuda', got a device of type"
                f" {self.root_device.type!r}"
            )

    @override
    def setup(self, trainer: Trainer) -> None:
        super().setup(trainer)
        if trainer.state.fn == TrainerFn.FITTING and self.world_size == 2:
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
        assert isinstance(self.model, DistributedDataParallel)
        assert self.lightning_module is not None
        alone = self.world_size == 1 and (self.estimator is None or self.estimator.transparent)
        if self.estimator is not None:
            self.estimator.reset()
        self.hook = AggregationHook(
            self.lightning_module,
            exchange=_EXCHANGES[self.exchange](self.world_size),
            aggregate=_only_row if alone else self._aggregate,
            estimator=None if alone else self.estimator,
            loss_scale=self._loss_scale,
            max_norm=self._max_worker_grad_norm,
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
    def teardown(self) -> None:
        # As Lightning does with optimizers: what is kept for a checkpoint after fit need not stay on the device.
        if self.estimator is not None:
            self.estimator.load_state(*map(_to_cpu, (self.estimator.worker_state(), self.estimator.shared_state())))
        for optimizer in self.optimizers:
            if isinstance(optimizer, DoubleMomentum):
                _optimizer_to_device(optimizer.base, torch.device("cpu"))
                optimizer.take_back()
        self.hook = None
        self._forward_redirection = _DDPForwardRedirection()
        super().teardown()

    @override
    def shared_state(self) -> dict[str, Any]:
        estimator = {} if self.estimator is None else self.estimator.shared_state()
        return super().shared_state() | {"estimator": estimator, "aggregator": self.aggregator.state_dict()}

    @override
    def load_shared_state(self, state: dict[str, Any]) -> None:
        super().load_shared_state(state)
        if self.estimator is not None:
            self.estimator.load_state(self.estimator.worker_state(), state["estimator"])
        self.aggregator.load_state_dict(state["aggregator"])

    @override
    def save_checkpoint(self, checkpoint: dict[str, Any], filepath: Any, storage_options: Any | None = None) -> None:
        # Not for weights only, nor in the process from which other start methods have spawned the ranks.
        if "optimizer_states" in checkpoint and torch.distributed.is_initialized():
            checkpoint[_CHECKPOINT_KEY] = self._states().save(alone=self._is_interrupted())
        super().save_checkpoint(checkpoint, filepath, storage_options)

    @override
    def load_optimizer_state_dict(self, checkpoint: Any) -> None:
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
            self._forward_redirection = PreviousPointRedirection(
                optimizer, self._max_worker_grad_norm, self._loss_scale
            )

    def _aggregate(self, matrix: WorkerMatrix) -> list[Tensor]:
        return self.aggregator.aggregate(matrix, self.num_byzantine)

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
            self.global_rank,
            self.world_size,
            self.root_device,
        )


def _to_cpu(state: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: value.cpu() for name, value in state.items()}


def _only_row(matrix: WorkerMatrix) -> list[Tensor]:
    return [block[0] for block in matrix.blocks]
