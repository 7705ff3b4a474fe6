"""The Lightning strategy for models divided by FSDP2: the mean within a replica, a robust rule across replicas."""

from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import Trainer
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities import rank_zero_warn
from lightning.pytorch.utilities.types import STEP_OUTPUT
from torch import Tensor
from torch.optim import Optimizer
from torch.utils.hooks import RemovableHandle
from typing_extensions import override

from lightning_byzantine.aggregation.aggregation import Aggregation, SingleWorker
from lightning_byzantine.aggregation.engine import AggregationEngine
from lightning_byzantine.aggregation.robust_aggregation import RobustAggregation
from lightning_byzantine.aggregation.shard_layout import ShardLayout
from lightning_byzantine.aggregation.sharded_gradients import ShardedGradients
from lightning_byzantine.aggregation.sharded_states import ShardedStates
from lightning_byzantine.aggregators import Aggregator
from lightning_byzantine.errors import WorkerLostError
from lightning_byzantine.estimators import Estimator
from lightning_byzantine.exchange import make_exchange
from lightning_byzantine.optim import DoubleMomentum, DoubleMomentumEstimator
from lightning_byzantine.strategies.audits.verdict import Verdict
from lightning_byzantine.strategies.lightning_internals import _METADATA_FILENAME, skips_backward
from lightning_byzantine.strategies.robust_strategy import RobustStrategy
from lightning_byzantine.strategies.sharded.layout import layout_of
from lightning_byzantine.strategies.sharded.replicas import ReplicatedModelParallel
from lightning_byzantine.strategies.skipped_steps import SkippedSteps

__all__ = ["ByzantineModelParallelStrategy"]

_CHECKPOINT_KEY = "byzantine_fsdp"
_FOLDER = "byzantine_fsdp"  # within a distributed checkpoint
_REFUSED = {
    "check_consistency_every_n_steps": "compares whole parameters of all ranks",
    "on_inconsistency": "compares whole parameters of all ranks",
    "on_worker_error": "would let a rank continue while the others of its replica wait for its parameters",
    "robust_buffers": "needs DDP, and FSDP2 leaves buffers to each rank",
    "robust_metrics": "takes each rank for a worker",
    "shadow": "trains as stock DDP does",
    "workers_per_process": "divides the batches of a process, and here a worker is several processes",
}


class ByzantineModelParallelStrategy(RobustStrategy, ReplicatedModelParallel):
    """FSDP2 that survives Byzantine replicas: gradients of replicas are aggregated by a robust rule, not averaged.

    A worker is a replica of the model, divided among ``data_parallel_size * tensor_parallel_size`` ranks. Its vector is
    the mean gradient of its ranks, as FSDP2 has computed it. Each rank exchanges its part of this with those that hold
    the same part of the other replicas; sums over the parts complete norms and distances, so that the rule sees whole
    vectors, and all ranks decide alike. The module is as for Lightning's ``ModelParallelStrategy``: its
    ``configure_model`` applies ``fully_shard`` with ``self.device_mesh``, which is that of one replica.

    Args:
        replicate_size: number of replicas, m. "auto" for what the other sizes leave; without these, the number of
            nodes, each of which is then one worker.
        data_parallel_size: number of parts that FSDP2 divides the model of a replica into. "auto" for what the other
            sizes leave.
        tensor_parallel_size: number of ranks in a tensor-parallel group.
        aggregator: the rule. None for ``PersistentFilter()``.
        num_byzantine: number of the m replicas that may be Byzantine, f < m / 2. None for the largest such f.
        estimator: what a replica sends. "auto" for ``WorkerMomentum(beta=0.9, transparent=True)``; None for raw
            gradients.
        max_worker_grad_norm: clips each replica's raw gradient to this norm, before the estimator. None for no
            clipping.
        exchange: "all_gather" for every rank to see its part of all replicas' vectors; "all_to_all" for every rank to
            aggregate its share of its part, which trusts it with them, at the memory of about one part.
        on_breakdown: what to do when more replicas send non-finite vectors than ``num_byzantine``: "raise" an error
            that names them, "skip" the optimizer step, or "propagate" the plain mean.
        max_skips: maximum number of consecutive skipped steps; one more raises the error.
        restart_estimator: ignore the estimator's and the rule's state when resuming from a checkpoint. Needed when the
            number of replicas has changed.
        **kwargs: other arguments of :class:`~lightning.pytorch.strategies.ModelParallelStrategy`.

    Raises:
        TypeError: if the aggregator is not an Aggregator, the estimator not an Estimator, or a size not a number.
        ValueError: if a choice is unknown or a number out of range; and when the Trainer is created, if the sizes don't
            multiply to the number of processes, or the aggregator does not support m and f.
        MisconfigurationException: if something else needs DDP; when the Trainer is created, if the number of replicas
            is not known; and when fit starts, if a gradient would bypass the aggregation.

    Example:
        >>> from lightning.pytorch import Trainer
        >>> strategy = ByzantineModelParallelStrategy(replicate_size=4, data_parallel_size=2)
        >>> trainer = Trainer(strategy=strategy, accelerator="cpu", devices=8, logger=False)
        >>> strategy.num_workers, strategy.num_byzantine, list(strategy.ranks_of(1))
        (4, 1, [2, 3])

    """

    def __init__(
        self,
        replicate_size: Literal["auto"] | int = "auto",
        data_parallel_size: Literal["auto"] | int = "auto",
        tensor_parallel_size: int = 1,
        aggregator: Aggregator | None = None,
        num_byzantine: int | None = None,
        estimator: Estimator | Literal["auto"] | None = "auto",
        max_worker_grad_norm: float | None = None,
        exchange: Literal["all_gather", "all_to_all"] = "all_gather",
        on_breakdown: Literal["raise", "skip", "propagate"] = "raise",
        max_skips: int = 10,
        restart_estimator: bool = False,
        **kwargs: Any,
    ) -> None:
        for name in kwargs.keys() & _REFUSED.keys():
            raise MisconfigurationException(
                f"{type(self).__name__} can't take `{name}`, which {_REFUSED[name]}. Leave it out, or use"
                " `strategy='byzantine_ddp'` if the model fits on one device."
            )
        super().__init__(
            aggregator=aggregator,
            num_byzantine=num_byzantine,
            estimator=estimator,
            max_worker_grad_norm=max_worker_grad_norm,
            exchange=exchange,
            on_breakdown=on_breakdown,
            max_skips=max_skips,
            restart_estimator=restart_estimator,
            replicate_size=replicate_size,
            data_parallel_size=data_parallel_size,
            tensor_parallel_size=tensor_parallel_size,
            **kwargs,
        )
        if isinstance(self.estimator, DoubleMomentumEstimator):
            raise MisconfigurationException(
                f"{type(self).__name__} can't take {type(self.estimator).__name__}, whose second pass runs within DDP."
                " Use WorkerMomentum(), or `strategy='byzantine_ddp_double_momentum'`."
            )
        if self.aggregator.uses_previous:
            raise MisconfigurationException(
                f"{type(self).__name__} can't take a rule that starts from the previous aggregate, of which checkpoints"
                f" would hold one part, got {self.aggregator!r}. Use another rule, such as PersistentFilter()."
            )
        self.engine: AggregationEngine | None = None
        self._gradients: ShardedGradients | None = None
        self._layout: ShardLayout | None = None
        self._skipping: SkippedSteps | None = None

    @property
    @override
    def num_workers(self) -> int:
        """Number of replicas, m."""
        return self.num_replicas

    @override
    def audit(self, worker: int) -> None:
        self.check_audits()

    @override
    def check_audits(self) -> None:
        raise MisconfigurationException(
            "Audits compute a worker's step once more on each other rank, which needs the whole model on one rank."
        )

    @override
    def observe_verdicts(self, observer: Callable[[Verdict], None]) -> RemovableHandle:
        return RemovableHandle(OrderedDict())  # there are none

    @override
    def setup_optimizers(self, trainer: Trainer) -> None:
        if not trainer.lightning_module.automatic_optimization:
            raise MisconfigurationException(
                f"{type(self).__name__} aggregates between the last backward and the optimizer's step, which needs"
                " automatic optimization, got automatic_optimization=False."
            )
        self._layout = layout_of(self._module, self.replica, self.shape, self.tensor_parallel_group, self.root_device)
        # All replicas start from the first one.
        self._layout.copy_first((*self._module.parameters(), *self._module.buffers()), self.shards.across)
        super().setup_optimizers(trainer)
        if any(isinstance(optimizer, DoubleMomentum) for optimizer in self.optimizers):
            raise MisconfigurationException(
                "DoubleMomentum needs a second pass, which runs within DDP. Return its base from"
                " `configure_optimizers`."
            )
        if self.estimator is not None:
            self.estimator.reset()
        self.aggregator.reset()
        self._skipping = SkippedSteps(trainer, self._breakdown)
        self.engine = AggregationEngine(
            dict(self._layout.parameters),
            self._aggregation(),
            make_exchange(self.exchange, self.num_workers, None, self.shards),
            self.estimator,
            max_norm=self._max_worker_grad_norm,
            breakdown=self._breakdown,
            on_skip=self._skipping.skip,
        )
        self._gradients = ShardedGradients(self.engine, self._layout)

    @override
    def training_step(self, *args: Any, **kwargs: Any) -> STEP_OUTPUT:
        step = super().training_step
        if self._watch is not None:
            step = self._watch.named(step)  # its replica's ranks wait for each other's parameters
        return step(*args, **kwargs)

    @override
    def backward(self, closure_loss: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        return self._watched(super().backward, "the backward pass", meets=False)(closure_loss, *args, **kwargs)

    @override
    def optimizer_step(self, optimizer: Optimizer, closure: Callable[[], Any], *args: Any, **kwargs: Any) -> Any:
        def aggregated() -> Any:
            loss = closure()
            assert self._gradients is not None
            if not skips_backward(self._module.trainer):
                # Before the gradient is clipped.
                self._watched(self._gradients.aggregate, "the aggregation", meets=False)()
            return loss

        assert self._skipping is not None
        return self._skipping.step(super().optimizer_step, optimizer, aggregated, *args, **kwargs)

    @override
    def save_checkpoint(self, checkpoint: dict[str, Any], filepath: Any, storage_options: Any | None = None) -> None:
        if self._has_failed():
            rank_zero_warn("No checkpoint is saved: it needs all ranks, and the run ends because of one.")
            return
        has_states = "optimizer_states" in checkpoint and self._layout is not None
        if has_states and not self._save_distributed_checkpoint:
            save = self._watched(self._states().save, "the gathering of states for a checkpoint")
            checkpoint[_CHECKPOINT_KEY] = save(alone=False) | self._counts()
        elif has_states:
            path = Path(self.broadcast(filepath))
            if self.is_global_zero and path.is_file():
                path.unlink()  # a whole one of before, whose place a folder takes
            self.barrier()
            save_parts = self._watched(self._states().save_parts, "the saving of states in a checkpoint")
            checkpoint[_CHECKPOINT_KEY] = save_parts(path / _FOLDER) | self._counts()
        super().save_checkpoint(checkpoint, filepath, storage_options)

    @override
    def load_checkpoint(self, checkpoint_path: Any, weights_only: bool | None = None) -> dict[str, Any]:
        checkpoint = super().load_checkpoint(checkpoint_path, weights_only)
        if self._module.trainer.state.fn == TrainerFn.FITTING:
            self._load_states(checkpoint, Path(self.broadcast(checkpoint_path)))
        return checkpoint

    @override
    def on_exception(self, exception: BaseException) -> None:
        super().on_exception(exception)
        if isinstance(exception, WorkerLostError) and exception.ranks:
            replicas = sorted({rank // len(self.replica) for rank in exception.ranks})
            exception.add_note(f"Of replica{'s' * (len(replicas) > 1)} {', '.join(map(str, replicas))}.")

    @override
    def teardown(self) -> None:
        # The layout stays, for a checkpoint after fit.
        self.engine = self._gradients = self._skipping = None
        super().teardown()

    def _aggregation(self) -> Aggregation:
        if self.num_workers == 1 and (self.estimator is None or self.estimator.transparent):
            return SingleWorker()
        return RobustAggregation(self.aggregator, self.num_byzantine, self._quarantine, self._observers)

    def _load_states(self, checkpoint: dict[str, Any], path: Path) -> None:
        state = checkpoint.get(_CHECKPOINT_KEY, {})
        self._load_counts(state)
        if self.restart_estimator:
            return
        if not state:
            rank_zero_warn(
                f"The checkpoint was not written by {type(self).__name__}, so the estimator and the aggregator start"
                " from zero."
            )
        elif (path / _METADATA_FILENAME).is_file():
            self._states().load_parts(path / _FOLDER, state)
        else:
            self._states().load(state)

    def _states(self) -> ShardedStates:
        assert self._layout is not None
        worker = self.replica.start // len(self.replica)
        remedy = (
            "reset the estimators and the aggregator with `restart_estimator=True` among the strategy's arguments, here"
            f" `{type(self).__name__}(..., estimator={self.estimator!r}, restart_estimator=True)`."
        )
        return ShardedStates(
            dict(self._layout.parameters),
            self.aggregator,
            self.estimator,
            range(worker, worker + 1),
            self.num_workers,
            self.root_device,
            remedy,
            self._layout,
            self.shards,
        )
