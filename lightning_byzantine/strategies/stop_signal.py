"""SIGTERM, on which ranks agree before they stop."""

from collections.abc import Callable
from contextlib import ExitStack
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities.exceptions import SIGTERMException

from lightning_byzantine.utilities.replacing import replaced

__all__ = ["StopSignal"]


class StopSignal:
    """Lets all ranks stop before the same batch, with a checkpoint, after any of them was sent SIGTERM.

    Lightning's handler communicates, and so waits for ever if the signal finds ranks in different collectives. This one
    leaves a mark. Before each batch, where Lightning broadcasts rank 0's mark, ranks tell each other. Then all stop as
    Lightning does, by a :class:`SIGTERMException`. Outside of ``fit``, where ranks do not meet at every batch, each
    stops on its own.

    Args:
        trainer: the trainer.
        any_rank: returns on all ranks whether any has called it with True.

    Attributes:
        is_agreed: whether all ranks stop now.

    """

    def __init__(self, trainer: pl.Trainer, any_rank: Callable[[bool], bool]) -> None:
        self.is_agreed = False
        self._is_marked = False
        self._trainer = trainer
        self._any_rank = any_rank
        self._replaced = ExitStack()
        connector, epoch_loop = trainer._signal_connector, trainer.fit_loop.epoch_loop
        self._replaced.enter_context(replaced(connector, _sigterm_notifier_fn=self._leave_mark))
        self._replaced.enter_context(replaced(epoch_loop, _broadcast_sigterm_tensor=self._stop_if_agreed))

    def restore(self) -> None:
        """Let Lightning handle the signal as before."""
        self._replaced.close()

    def _leave_mark(self, *_: Any) -> None:
        self._is_marked = True
        if self._trainer.state.fn != TrainerFn.FITTING:
            self._trainer._signal_connector.received_sigterm = True

    def _stop_if_agreed(self) -> None:
        if not self._any_rank(self._is_marked):
            return
        self.is_agreed = True
        self._trainer._signal_connector.received_sigterm = True
        for callback in self._trainer.checkpoint_callbacks:
            if isinstance(callback, ModelCheckpoint):
                self._replaced.enter_context(replaced(callback, save_on_exception=True))
        raise SIGTERMException
