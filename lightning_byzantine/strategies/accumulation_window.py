"""Which worker a batch belongs to, if one process acts as several."""

import lightning.pytorch as pl
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.callbacks import GradientAccumulationScheduler

__all__ = ["AccumulationWindow"]


class AccumulationWindow:
    """The batches of one optimizer step: batch j belongs to worker j mod k.

    Args:
        trainer: the Trainer. If its ``accumulate_grad_batches`` is 1, it becomes k until :meth:`restore`.
        num_local_workers: number of workers that this process acts as, k.

    Raises:
        MisconfigurationException: if ``accumulate_grad_batches`` is neither 1 nor a multiple of k, a callback changes
            it, or the module optimizes manually, so that it does not apply.

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
                f"workers_per_process={num_local_workers} needs the same accumulate_grad_batches in all epochs, got a"
                " GradientAccumulationScheduler. Remove it."
            )
        if self._given == 1:
            trainer.accumulate_grad_batches = num_local_workers
        if trainer.accumulate_grad_batches % num_local_workers:
            raise MisconfigurationException(
                "accumulate_grad_batches must be a multiple of workers_per_process, got accumulate_grad_batches="
                f"{trainer.accumulate_grad_batches} with workers_per_process={num_local_workers}"
            )

    def restore(self) -> None:
        """Reset the Trainer's ``accumulate_grad_batches`` to what it was."""
        self._trainer.accumulate_grad_batches = self._given

    @property
    def position(self) -> int:
        """Index of the current batch in the window, from 0."""
        return (self._num_started - 1) % self._trainer.accumulate_grad_batches

    @property
    def worker(self) -> int:
        """The worker that the current batch belongs to, in [0, k)."""
        return self.position % self.num_local_workers

    @property
    def next_worker(self) -> int:
        """The worker that the next batch, which is being moved to the device, belongs to, in [0, k)."""
        # A window has a multiple of k batches, so this starts at 0 with each window.
        return self._num_started % self.num_local_workers

    @property
    def is_complete(self) -> bool:
        """Whether every worker has had a batch; the last window of an epoch may be shorter."""
        return self.position + 1 >= self.num_local_workers

    @property
    def batches_of_a_worker(self) -> int:
        """Number of batches that each worker averages its gradient over."""
        return self._trainer.accumulate_grad_batches // self.num_local_workers

    @property
    def _num_started(self) -> int:
        # In this epoch. Lightning counts a batch once it is on the device.
        return self._trainer.fit_loop.epoch_loop.batch_progress.current.ready
