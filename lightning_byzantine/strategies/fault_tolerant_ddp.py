"""DDP that is robust to faulty ranks in everything but gradients, and names them in errors."""

import sys
from abc import abstractmethod
from collections.abc import Callable, Collection, Iterable
from contextlib import nullcontext
from typing import Any, Literal, TypeVar

import torch
from lightning.fabric.plugins import CheckpointIO
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.strategies import DDPStrategy
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities.types import STEP_OUTPUT
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel
from typing_extensions import override

from lightning_byzantine.aggregation.observers import Observers
from lightning_byzantine.aggregation.voters import Voters
from lightning_byzantine.errors import ByzantineBreakdownError
from lightning_byzantine.exchange.robust_buffers import RobustBuffers
from lightning_byzantine.exchange.robust_reduce import robust_reduce
from lightning_byzantine.exchange.witnesses import Witnesses
from lightning_byzantine.strategies.checkpoint_io import AtomicCheckpointIO
from lightning_byzantine.strategies.consistency import ConsistencyCheck
from lightning_byzantine.strategies.last_good_checkpoint import LastGoodCheckpoint
from lightning_byzantine.strategies.lightning_internals import _WrappingCheckpointIO, position_of
from lightning_byzantine.strategies.stop_signal import StopSignal
from lightning_byzantine.strategies.worker_errors import WorkerErrors
from lightning_byzantine.utilities.checks import check_choice, check_integer_at_least
from lightning_byzantine.watch.rank_watch import RankWatch

__all__ = ["FaultTolerantDDP"]

_Collective = TypeVar("_Collective", bound=Callable[..., Any])


class FaultTolerantDDP(DDPStrategy):
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
        self._observers = Observers()
        self._buffers: RobustBuffers | None = None
        self._consistency: ConsistencyCheck | None = None
        self._last_good: LastGoodCheckpoint | None = None
        self._watch: RankWatch | None = None
        self._witnesses: Witnesses | None = None
        self._stop_signal: StopSignal | None = None

    @property
    @abstractmethod
    def num_workers(self) -> int:
        """Number of workers, m."""

    @property
    @abstractmethod
    def num_byzantine(self) -> int:
        """Number of workers that may be Byzantine, f."""

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
            self._watch = RankWatch(self.root_device, lambda: position_of(self._module.trainer))
            # A process that lies does so as all of its workers.
            max_faulty = self.num_byzantine // (self.num_workers // self.world_size)
            if max_faulty > 0:
                meet = self._watched(Witnesses, "the exchange of keys", meets=False)
                self._witnesses = meet(max_faulty, self.root_device, self._exclude)

    @override
    def setup(self, trainer: Trainer) -> None:
        if self._watch is not None:
            self._stop_signal = StopSignal(trainer, self._watch)
        self._watched(super().setup, "the set-up of the model")(trainer)
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
    def validation_step(self, *args: Any, **kwargs: Any) -> STEP_OUTPUT:
        if self._stop_signal is not None:
            self._stop_signal.before_validation_batch()
        return super().validation_step(*args, **kwargs)

    @override
    def on_validation_start(self) -> None:
        super().on_validation_start()
        if self._stop_signal is not None:
            self._stop_signal.on_validation_start()

    @override
    def on_validation_end(self) -> None:
        super().on_validation_end()
        if self._stop_signal is not None:
            self._stop_signal.on_validation_end()

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
        if not _is_of_all_ranks(group):
            return super().reduce(tensor, group, reduce_op)
        if self._has_failed():
            return tensor
        # Lightning's own decisions, such as whether any rank stops, are not reduced by name.
        by_name = isinstance(tensor, Tensor) and isinstance(reduce_op, str) and group is None
        if by_name and self._robust_metrics and self.world_size > 1:
            # Ranks may be fewer than workers.
            most = min(self.num_byzantine, (self.world_size - 1) // 2)
            reduced = self._watched(robust_reduce, f"a reduction{_of(tensor)}")
            return reduced(tensor, reduce_op, most, self._voters.gather, self._voters.note_outvoted)
        return self._watched(super().reduce, f"a reduction{_of(tensor)}")(tensor, group, reduce_op)

    @override
    def all_gather(self, tensor: Tensor, group: Any = None, sync_grads: bool = False) -> Tensor:
        all_gather = super().all_gather
        if _is_of_all_ranks(group):
            all_gather = self._watched(all_gather, f"an all_gather{_of(tensor)}")
        return all_gather(tensor, group, sync_grads)

    @override
    def barrier(self, *args: Any, **kwargs: Any) -> None:
        if self._has_failed():
            return
        if self._watch is not None and self.root_device.type == "cpu":
            self._watch.any_rank("a barrier", False)  # is one, of ranks; on GPUs, their queues are to be empty too
        else:
            self._watched(super().barrier, "a barrier")(*args, **kwargs)

    @override
    def broadcast(self, obj: Any, src: int = 0) -> Any:
        return obj if self._has_failed() else self._watched(super().broadcast, "a broadcast")(obj, src)

    @override
    def on_train_end(self) -> None:
        if self._stop_signal is not None:
            self._stop_signal.on_train_end()
        # The last forward has changed the buffers, and an evaluation after this would use rank 0's.
        if self._buffers is not None:
            self._buffers.synchronize()
        super().on_train_end()

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
        self._has_failed()
        if isinstance(exception, ByzantineBreakdownError) and self.worker_errors is not None:
            exception.add_note(
                f"On this rank, `training_step` failed {self.worker_errors.count} times. {self.worker_errors.last}"
            )

    @override
    def teardown(self) -> None:
        try:
            if self._watch is not None:
                self._watch.finish(is_well=not self._has_failed())
        finally:
            if self._stop_signal is not None:
                self._stop_signal.restore()
            self._watch = self._witnesses = self._stop_signal = self._buffers = self._consistency = None
            self._observers.forget_notes()
            super().teardown()

    @property
    def _voters(self) -> Voters:
        return Voters(self._witnesses, self._observers)

    def _exclude(self, ranks: Collection[int]) -> None:
        """Add to the next report which ranks are proved to have told others different things."""
        self._observers.note_equivocated(self._workers_of(ranks))

    def _workers_of(self, ranks: Iterable[int]) -> list[int]:
        per_rank = self.num_workers // self.world_size
        return [rank * per_rank + worker for rank in ranks for worker in range(per_rank)]

    @property
    def _module(self) -> LightningModule:
        assert self.lightning_module is not None
        return self.lightning_module

    def _watched(self, collective: _Collective, what: str, meets: bool = True) -> _Collective:
        """Return the same function, except that it fails when ranks are missing, with an error that names them."""
        return collective if self._watch is None else self._watch.watched(collective, what, meets)

    def _has_failed(self) -> bool:
        """Return whether the run ends on this rank for an error, and tell the others, who may be elsewhere in the code.

        Collectives, such as of callbacks that save a checkpoint then, would not complete.
        """
        has_agreed = self._stop_signal is not None and self._stop_signal.is_agreed
        if self._watch is None or has_agreed or not self._module.trainer.interrupted:
            return False
        error = sys.exception()
        if error is not None:
            self._watch.fail(error)
        return True


def _is_of_all_ranks(group: Any) -> bool:
    return group is None or group is torch.distributed.group.WORLD


def _of(value: Any) -> str:
    """Return in words what must be alike on all ranks in a collective of this value."""
    if not isinstance(value, Tensor):
        return ""
    return f" of {value.numel()} {str(value.dtype).removeprefix('torch.')}"
