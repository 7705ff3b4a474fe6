"""Strategies whose collectives fail, with an error that names a rank, where they would wait for ever."""

import sys
from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any, TypeVar

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.strategies import ParallelStrategy
from lightning.pytorch.utilities.types import STEP_OUTPUT
from torch import Tensor
from typing_extensions import override

from lightning_byzantine.aggregation.observers import Observers
from lightning_byzantine.strategies.lightning_internals import position_of
from lightning_byzantine.strategies.stop_signal import StopSignal
from lightning_byzantine.watch.rank_watch import RankWatch

__all__ = ["FaultTolerant", "is_of_all_ranks", "size_of"]

_Collective = TypeVar("_Collective", bound=Callable[..., Any])


class FaultTolerant(ParallelStrategy, ABC):
    """Mixed into one of Lightning's strategies: ranks meet, and end together when one of them fails.

    Args:
        **kwargs: arguments of the strategy.

    """

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self._observers = Observers()
        self._watch: RankWatch | None = None
        self._stop_signal: StopSignal | None = None

    @property
    @abstractmethod
    def num_workers(self) -> int:
        """Number of workers, m."""

    @property
    @abstractmethod
    def num_byzantine(self) -> int:
        """Number of workers that may be Byzantine, f."""

    def ranks_of(self, worker: int) -> range:
        """Return the ranks that are a worker together, or the one that acts as this worker among others."""
        first = worker * self.world_size // self.num_workers
        return range(first, max(first + 1, (worker + 1) * self.world_size // self.num_workers))

    @override
    def setup_environment(self) -> None:
        super().setup_environment()
        if self.world_size > 1:
            self._watch = RankWatch(self.root_device, lambda: position_of(self._module.trainer))

    @override
    def setup(self, trainer: Trainer) -> None:
        if self._watch is not None:
            self._stop_signal = StopSignal(trainer, self._watch)
        self._watched(super().setup, "the set-up of the model")(trainer)

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
    def on_train_end(self) -> None:
        if self._stop_signal is not None:
            self._stop_signal.on_train_end()
        super().on_train_end()

    @override
    def reduce(self, tensor: Any, group: Any = None, reduce_op: Any = "mean") -> Any:
        reduce = super().reduce  # type: ignore[safe-super]  # of the strategy that this is mixed into
        if not is_of_all_ranks(group):
            return reduce(tensor, group, reduce_op)
        if self._has_failed():
            return tensor
        return self._watched(reduce, f"a reduction{size_of(tensor)}")(tensor, group, reduce_op)

    @override
    def all_gather(self, tensor: Tensor, group: Any = None, sync_grads: bool = False) -> Tensor:
        all_gather = super().all_gather
        if is_of_all_ranks(group):
            all_gather = self._watched(all_gather, f"an all_gather{size_of(tensor)}")
        return all_gather(tensor, group, sync_grads)

    @override
    def barrier(self, *args: Any, **kwargs: Any) -> None:
        if self._has_failed():
            return
        if self._watch is not None and self.root_device.type == "cpu":
            self._watch.any_rank("a barrier", False)  # is one, of ranks; on GPUs, their queues are to be empty too
        else:
            barrier = super().barrier  # type: ignore[safe-super]
            self._watched(barrier, "a barrier")(*args, **kwargs)

    @override
    def broadcast(self, obj: Any, src: int = 0) -> Any:
        broadcast = super().broadcast  # type: ignore[safe-super]
        return obj if self._has_failed() else self._watched(broadcast, "a broadcast")(obj, src)

    @override
    def on_exception(self, exception: BaseException) -> None:
        super().on_exception(exception)
        self._has_failed()

    @override
    def teardown(self) -> None:
        try:
            if self._watch is not None:
                self._watch.finish(is_well=not self._has_failed())
        finally:
            if self._stop_signal is not None:
                self._stop_signal.restore()
            self._watch = self._stop_signal = None
            self._observers.forget_notes()
            super().teardown()

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


def is_of_all_ranks(group: Any) -> bool:
    """Return whether a collective of this group is one of all ranks."""
    return group is None or group is torch.distributed.group.WORLD


def size_of(value: Any) -> str:
    """Return in words what must be alike on all ranks in a collective of this value."""
    if not isinstance(value, Tensor):
        return ""
    return f" of {value.numel()} {str(value.dtype).removeprefix('torch.')}"
