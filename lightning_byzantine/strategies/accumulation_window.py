"""Which worker a batch belongs to, where one process acts as several."""

import lightning.pytorch as pl
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.callbacks import GradientAccumulationScheduler

__all__ = ["AccumulationWindow"]


class AccumulationWindow:
    """The batches of one optimizer step, as Lightning counts them: number j is worker j mod k's.

    Args:
        trainer: the Trainer. Its ``accumulate_grad_batches`` becomes k where it is 1; see :meth:`restore`.
        num_local_workers: how many workers this process acts as, k.

    Raises:
        MisconfigurationException: if ``accumulate_grad_batches`` is neither 1 nor a multiple of k, or a callback is to
            change it, or if the module optimizes manually, where Lightning knows no windows.

    """

    def __init__(self, trainer: pl.Trainer, num_local_workers: int) -> None:
        self.num_local_workers = num_local_workers
        self._trainer = trainer
        self._given = trainer.accumulate_grad_batches
        if num_local_workers == 1:
            return
        if not trainer.lightning_module.automatic_optimization:
            raise MisconfigurationException(
                f"workers_per_process={num_local_workers} needs automatic optimization, in which a batch belongs to one"
                " worker, got automatic_optimization=False. Start one process for each worker."
            )
        if any(isinstance(callback, GradientAccumulationScheduler) for callback in trainer.callbacks):  # type: ignore[attr-defined]
            raise MisconfigurationException(
                f"workers_per_process={num_local_workers} has windows of the same size in all epochs, got a"
                " GradientAccumulationScheduler. Leave it out."
            )
        if self._given == 1:
            trainer.accumulate_grad_batches = num_local_workers
        if trainer.accumulate_grad_batches % num_local_workers:
            raise MisconfigurationException(
                "accumulate_grad_batches must be a multiple of workers_per_process, got accumulate_grad_batches="
                f"{trainer.accumulate_grad_batches} with workers_per_process={num_local_workers}"
            )

    def restore(self) -> None:
        """Give the Trainer back the ``accumulate_grad_batches`` it had."""
        self._trainer.accumulate_grad_batches = self._given

    @property
    def position(self) -> int:
        """The current batch's number in the window, from 0."""
        return self._position_of(self._num_started - 1)

    @property
    def worker(self) -> int:
        """Whose batch the current one is, in [0, k)."""
        return self.position % self.num_local_workers

    @property
    def next_worker(self) -> int:
        """Whose batch the one that is on its way to the device is, in [0, k)."""
        return self._position_of(self._num_started) % self.num_local_workers

    @property
    def is_complete(self) -> bool:
        """Whether every worker has had a batch; the end of an epoch may cut a window short."""
        return self.position + 1 >= self.num_local_workers

    @property
    def batches_of_a_worker(self) -> int:
        """By how many the mean over the batches of one worker divides."""
        return self._trainer.accumulate_grad_batches // self.num_local_workers

    @property
    def _num_started(self) -> int:
        # Of this epoch; Lightning counts a batch when it has arrived on the device.
        return self._trainer.fit_loop.epoch_loop.batch_progress.current.ready

    def _position_of(self, batch: int) -> int:
        return batch % self._trainer.accumulate_grad_batches
