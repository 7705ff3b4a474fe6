"""DDP that is robust to faulty ranks in everything but gradients, and names them in errors."""

from collections.abc import Collection, Iterable
from contextlib import nullcontext
from typing import Any, Literal

import torch
from lightning.fabric.plugins import CheckpointIO
from lightning.pytorch import Trainer
from lightning.pytorch.strategies import DDPStrategy
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities.types import STEP_OUTPUT
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel
from typing_extensions import override

from lightning_byzantine.aggregation.voters import Voters
from lightning_byzantine.errors import ByzantineBreakdownError
from lightning_byzantine.exchange.robust_buffers import RobustBuffers
from lightning_byzantine.exchange.robust_reduce import robust_reduce
from lightning_byzantine.exchange.witnesses import Witnesses
from lightning_byzantine.strategies.checkpoint_io import AtomicCheckpointIO
from lightning_byzantine.strategies.consistency import ConsistencyCheck
from lightning_byzantine.strategies.fault_tolerant import FaultTolerant, is_of_all_ranks, size_of
from lightning_byzantine.strategies.last_good_checkpoint import LastGoodCheckpoint
from lightning_byzantine.strategies.lightning_internals import _WrappingCheckpointIO
from lightning_byzantine.strategies.worker_errors import WorkerErrors
from lightning_byzantine.utilities.checks import check_choice, check_integer_at_least

__all__ = ["FaultTolerantDDP"]


class FaultTolerantDDP(FaultTolerant, DDPStrategy):
    """DDP with votes instead of rank 0's buffers and means of metrics, and with errors that name a rank.

    Gradients are left to subclasses.

    Args:
        robust_buffers: replace buffers, such as BatchNorm statistics, by the median over ranks (integers by the most
            frequent value) where DDP would broadcast rank 0's; not with ``broadcast_buffers=False``.
        robust_metrics: reduce ``self.log(..., sync_dist=True)`` by the median instead of the mean, a sum by m times the
            median, and leave out the f largest values before a maximum, the f smallest before a minimum.
        check_consistency_every_n_steps: how often to compare parameters and optimizer state of all ranks, in optimizer
            steps; 0 for never.
        on_inconsistency: what to do when ranks differ: "raise", or "restore" the state of the majority.
        on_worker_error: what to do when a rank raises in its ``training_step``, or returns None or a loss without a
            graph: "raise", or "exclude" the gradient of the batch's worker from that step and continue.
        **kwargs: arguments of DDPStrategy.

    """

    def __init__(
        self,
        robust_buffers: bool = True,
        robust_metrics: bool = False,
        check_consistency_every_n_steps: int = 0,
        on_inconsistency: Literal["raise", "restore"] = "raise",
        on_worker_error: Literal["raise", "exclude"] = "raise",
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        self.worker_errors: WorkerErrors | None = None
        self._robust_buffers = robust_buffers
        self._robust_metrics = robust_metrics
        name, steps = "check_consistency_every_n_steps", check_consistency_every_n_steps
        self._check_every = check_integer_at_least(name, steps, 0)
        self._on_inconsistency = check_choice("on_inconsistency", on_inconsistency, ("raise", "restore"))
        self._on_worker_error = check_choice("on_worker_error", on_worker_error, ("raise", "exclude"))
        self._buffers: RobustBuffers | None = None
        self._consistency: ConsistencyCheck | None = None
        self._last_good: LastGoodCheckpoint | None = None
        self._witnesses: Witnesses | None = None

    def shared_state(self) -> dict[str, Any]:
        """Return the state that is the same on all ranks, as nested dicts and lists of tensors and numbers."""
        return {
            "parameters": {name: value.detach() for name, value in self._module.named_parameters()},
            "optimizers": [optimizer.state_dict() for optimizer in self.optimizers],
        }

    @torch.no_grad()
    def load_shared_state(self, state: dict[str, Any]) -> None:
        """Load what :meth:`shared_state` returned on another rank."""
        for name, parameter in self._module.named_parameters():
            parameter.copy_(state["parameters"][name])
        for optimizer, saved in zip(self.optimizers, state["optimizers"], strict=True):
            optimizer.load_state_dict(saved)

    @property
    @override
    def checkpoint_io(self) -> CheckpointIO:
        # Replaces Lightning's default only, like the overridden method.
        if self._checkpoint_io is None:
            self._checkpoint_io = AtomicCheckpointIO()
        elif isinstance(self._checkpoint_io, _WrappingCheckpointIO):
            self._checkpoint_io.checkpoint_io = AtomicCheckpointIO()
        return self._checkpoint_io

    @checkpoint_io.setter
    def checkpoint_io(self, io: CheckpointIO) -> None:
        self._checkpoint_io = io

    @override
    def setup_environment(self) -> None:
        super().setup_environment()
        if self.world_size > 1:
            # A process that lies does so as all of its workers; a worker, with all of its processes.
            max_faulty = self.num_byzantine * self.world_size // self.num_workers
            if max_faulty > 0:
                meet = self._watched(Witnesses, "the exchange of keys", meets=False)
                self._witnesses = meet(max_faulty, self.root_device, self._exclude)

    @override
    def setup(self, trainer: Trainer) -> None:
        super().setup(trainer)
        if trainer.state.fn != TrainerFn.FITTING:
            return
        self._last_good = LastGoodCheckpoint(trainer.lightning_module)
        if self._on_worker_error == "exclude" and self.num_workers > 1:
            self.worker_errors = WorkerErrors(trainer.lightning_module)
        if self._check_every and self.world_size > 1:
            self._consistency = ConsistencyCheck(
                self._check_every, self._on_inconsistency, self.shared_state, self.load_shared_state, self.root_device
            )

    @override
    def configure_ddp(self) -> None:
        super().configure_ddp()
        if self._robust_buffers and self.world_size > 1:
            assert isinstance(self.model, DistributedDataParallel)
            gather = self._watched(self._voters.gather, "the vote on buffers", meets=False)
            self._buffers = RobustBuffers(self.model, gather, self._voters.ranks, self._voters.note_outvoted)

    @override
    def training_step(self, *args: Any, **kwargs: Any) -> STEP_OUTPUT:
        with nullcontext() if self.worker_errors is None else self.worker_errors.excluded():
            return super().training_step(*args, **kwargs)

    @override
    def backward(self, closure_loss: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        assert isinstance(self.model, DistributedDataParallel)
        backward = super().backward
        if self.model.require_backward_grad_sync:
            backward = self._watched(backward, "the backward pass", meets=False)
        return backward(closure_loss, *args, **kwargs)

    @override
    def optimizer_step(self, *args: Any, **kwargs: Any) -> Any:
        output = super().optimizer_step(*args, **kwargs)
        if self._consistency is not None and self._consistency.is_due():
            self._watched(self._consistency.compare, "the check for consistency")()
        return output

    @override
    def reduce(self, tensor: Any, group: Any = None, reduce_op: Any = "mean") -> Any:
        # Lightning's own decisions, such as whether any rank stops, are not reduced by name.
        by_name = isinstance(tensor, Tensor) and isinstance(reduce_op, str) and group is None
        is_robust = by_name and self._robust_metrics and self.world_size > 1
        if not is_robust or not is_of_all_ranks(group) or self._has_failed():
            return super().reduce(tensor, group, reduce_op)
        # Ranks may be fewer than workers, or more.
        most = max(self.num_byzantine, self.num_byzantine * self.world_size // self.num_workers)
        most = min(most, (self.world_size - 1) // 2)
        reduced = self._watched(robust_reduce, f"a reduction{size_of(tensor)}")
        return reduced(tensor, reduce_op, most, self._voters.gather, self._voters.note_outvoted)

    @override
    def on_train_end(self) -> None:
        super().on_train_end()
        # The last forward has changed the buffers, and an evaluation after this would use rank 0's.
        if self._buffers is not None:
            self._buffers.synchronize()

    @override
    def save_checkpoint(self, checkpoint: dict[str, Any], filepath: Any, storage_options: Any | None = None) -> None:
        if self._buffers is not None and not self._has_failed():
            self._buffers.synchronize()  # in place, so that the checkpoint has the result
        if not self.is_global_zero or self._last_good is None or self._last_good.may_write(filepath):
            super().save_checkpoint(checkpoint, filepath, storage_options)

    @override
    def remove_checkpoint(self, filepath: Any) -> None:
        if self._last_good is None or self._last_good.may_remove(filepath):
            super().remove_checkpoint(filepath)

    @override
    def on_exception(self, exception: BaseException) -> None:
        super().on_exception(exception)
        if isinstance(exception, ByzantineBreakdownError) and self.worker_errors is not None:
            exception.add_note(
                f"On this rank, `training_step` failed {self.worker_errors.count} times. {self.worker_errors.last}"
            )

    @override
    def teardown(self) -> None:
        try:
            super().teardown()
        finally:
            self._witnesses = self._buffers = self._consistency = None

    @property
    def _voters(self) -> Voters:
        return Voters(self._witnesses, self._observers)

    def _exclude(self, ranks: Collection[int]) -> None:
        """Add to the next report which ranks are proved to have told others different things."""
        self._observers.note_equivocated(self._workers_of(ranks))

    def _workers_of(self, ranks: Iterable[int]) -> list[int]:
        """Return the workers that these ranks act as, alone or with others."""
        named = set(ranks)
        return [worker for worker in range(self.num_workers) if not named.isdisjoint(self.ranks_of(worker))]
