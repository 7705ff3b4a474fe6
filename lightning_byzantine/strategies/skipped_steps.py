"""Optimizer steps that are skipped because their gradients could not be aggregated."""

from collections.abc import Callable
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.utilities import rank_zero_warn
from torch.optim import Optimizer

from lightning_byzantine.aggregation.breakdown import Breakdown
from lightning_byzantine.errors import ByzantineBreakdownError

__all__ = ["SkippedSteps"]


class SkippedSteps:
    """Skips the next step of each optimizer: neither parameters nor the optimizer's state change.

    Of each one, because it is not known here which optimizer the gradients belong to.

    Args:
        trainer: its loggers log the number of skipped steps.
        breakdown: counts the skipped steps.

    """

    def __init__(self, trainer: pl.Trainer, breakdown: Breakdown) -> None:
        self._trainer = trainer
        self._breakdown = breakdown
        self._to_skip: set[int] = set()

    def skip(self, error: ByzantineBreakdownError) -> None:
        """Skip the current step, with a warning."""
        self._to_skip = {id(optimizer) for optimizer in self._trainer.strategy.optimizers}
        rank_zero_warn(
            f"{error}. Skipped the optimizer's step ({self._breakdown.skipped} so far in this run); the run ends after"
            f" {self._breakdown.max_skips} in a row (`max_skips`)."
        )
        for logger in self._trainer.loggers:
            logger.log_metrics({"byzantine/skipped_steps": self._breakdown.skipped}, step=self._trainer.global_step)

    def step(
        self, step: Callable[..., Any], optimizer: Optimizer, closure: Callable[[], Any], *args: Any, **kwargs: Any
    ) -> Any:
        """Take an optimizer's step, unless the aggregation has failed, in its closure or before.

        Args:
            step: takes the step, given the following arguments.
            optimizer: the optimizer.
            closure: computes the gradients, and returns the loss.
            *args: other arguments of ``step``.
            **kwargs: other arguments of ``step``.

        """

        def guarded() -> Any:
            loss = closure()
            if id(optimizer) in self._to_skip:
                self._to_skip.remove(id(optimizer))
                raise _SkipStepError(loss)
            return loss

        try:
            return step(optimizer, guarded, *args, **kwargs)
        except _SkipStepError as skip:
            return skip.args[0]


class _SkipStepError(Exception):
    """Ends an optimizer's step before parameters or state have changed; holds the loss that the closure returned."""
