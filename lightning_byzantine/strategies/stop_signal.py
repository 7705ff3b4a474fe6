"""SIGTERM, on which ranks agree before they stop."""

from contextlib import ExitStack
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities.exceptions import SIGTERMException

from lightning_byzantine.utilities.replacing import replaced
from lightning_byzantine.watch import RankWatch

__all__ = ["StopSignal"]


class StopSignal:
    """Lets all ranks stop before the same batch, with a checkpoint, after any of them was sent SIGTERM.

    Lightning's handler communicates, and so waits for ever if the signal finds ranks in different collectives. This one
    leaves a mark. Before each batch, where Lightning broadcasts rank 0's mark, ranks tell each other. Then all stop as
    Lightning does, by a :class:`SIGTERMException`. In validation they do so before each batch if all ranks have equally
    many, and at its end, and once more at the end of training. Outside of ``fit``, where nothing is lost, each rank
    stops on its own.

    Args:
        trainer: the trainer.
        watch: where ranks meet.

    Attributes:
        is_agreed: whether all ranks stop now.

    """

    def __init__(self, trainer: pl.Trainer, watch: RankWatch) -> None:
        self.is_agreed = False
        self._is_marked = False
        self._validates_alike = False
        self._trainer = trainer
        self._watch = watch
        self._replaced = ExitStack()
        connector, epoch_loop = trainer._signal_connector, trainer.fit_loop.epoch_loop
        self._replaced.enter_context(replaced(connector, _sigterm_notifier_fn=self._leave_mark))
        self._replaced.enter_context(replaced(epoch_loop, _broadcast_sigterm_tensor=self._stop_if_agreed))

    def restore(self) -> None:
        """Let Lightning handle the signal as before."""
        self._replaced.close()

    def on_validation_start(self) -> None:
        """Find out whether ranks can meet before each batch."""
        if self._is_in_fit():
            trainer = self._trainer
            counts = trainer.num_sanity_val_batches if trainer.sanity_checking else trainer.num_val_batches
            self._validates_alike = self._watch.are_equal("the start of validation", counts)

    def before_validation_batch(self) -> None:
        """Stop if any rank has the mark."""
        if self._is_in_fit() and self._validates_alike:
            self._stop_if_agreed()

    def on_validation_end(self) -> None:
        """Stop if any rank has the mark."""
        if self._is_in_fit():
            self._stop_if_agreed("the end of validation")

    def on_train_end(self) -> None:
        """Stop if any rank has the mark, so that nothing follows."""
        self._stop_if_agreed("the end of training")

    def _is_in_fit(self) -> bool:
        return self._trainer.state.fn == TrainerFn.FITTING

    def _leave_mark(self, *_: Any) -> None:
        self._is_marked = True
        if not self._is_in_fit():
            self._trainer._signal_connector.received_sigterm = True

    def _stop_if_agreed(self, where: str = "the start of the next batch") -> None:
        if not self._watch.any_rank(where, self._is_marked):
            return
        self.is_agreed = True
        self._trainer._signal_connector.received_sigterm = True
        for callback in self._trainer.checkpoint_callbacks:
            if isinstance(callback, ModelCheckpoint):
                self._replaced.enter_context(replaced(callback, save_on_exception=True))
        raise SIGTERMException
