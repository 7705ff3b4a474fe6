"""Runs a training step so that nobody notices."""

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import lightning.pytorch as pl
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.loggers import Logger
from lightning.pytorch.loggers.logger import DummyLogger
from lightning.pytorch.utilities import rank_zero_warn
from torch import nn
from torchmetrics import Metric

from lightning_byzantine.strategies.second_pass.snapshot import Snapshot
from lightning_byzantine.utilities.rng import replayed_rng

__all__ = ["unnoticed"]


@contextmanager
def unnoticed(module: pl.LightningModule, batch: Any) -> Iterator[None]:
    """Undo at the end what a training step does beside computing its loss.

    Random numbers, what the module and its submodules hold (buffers, metrics, attributes), logging and printing, and
    containers in the batch.

    Args:
        module: the module that takes the step.
        batch: what the step gets; its tensors must not be written to.

    Raises:
        MisconfigurationException: if the step writes to a tensor of its batch, or to a trainable parameter, by one of
            torch's own in-place operations.

    """
    trainer = module.trainer
    own, handed_in, loggers = Snapshot(module), Snapshot(batch, copy_tensors=False), trainer.loggers
    if own.iterators:
        rank_zero_warn(
            f"The module holds an iterator, a {type(own.iterators[0]).__name__}. Double momentum runs `training_step`"
            " twice a batch, and what it draws from an iterator is not the same twice. Draw in `on_train_batch_start`."
        )
    with ExitStack() as stack:
        stack.enter_context(replayed_rng(module.device))
        stack.callback(own.restore)
        stack.callback(handed_in.restore)
        stack.callback(setattr, trainer, "loggers", loggers)
        trainer.loggers = [_SilentLogger(logger) for logger in loggers]
        # For those who have kept hold of `self.log` itself.
        results = trainer._results
        if results is not None:
            results.log = _nothing
            stack.callback(vars(results).pop, "log")
        for part in own.modules:
            if isinstance(part, pl.LightningModule):
                vars(part).update(log=_nothing, print=_nothing, all_gather=_warning(part.all_gather))
            elif isinstance(part, Metric):
                part.distributed_available_fn = _never
        yield
        if handed_in.changed:
            raise MisconfigurationException(
                "Double momentum runs `training_step` twice on each batch, but this one writes to a tensor of its batch"
                f" in place, of shape {tuple(handed_in.changed[0].shape)}. Write to a copy, such as `x = x + noise`"
                " instead of `x += noise`."
            )
        if any(isinstance(tensor, nn.Parameter) for tensor in own.changed):
            raise MisconfigurationException(
                "Double momentum runs `training_step` at two points, but this one writes to a parameter. Do that in"
                " `on_train_batch_end`."
            )


class _SilentLogger(DummyLogger):
    """Knows where its logger logs to, and logs nothing."""

    def __init__(self, logger: Logger) -> None:
        super().__init__()
        self._logger = logger

    name = property(lambda self: self._logger.name)
    version = property(lambda self: self._logger.version)
    save_dir = property(lambda self: self._logger.save_dir)
    root_dir = property(lambda self: self._logger.root_dir)
    log_dir = property(lambda self: self._logger.log_dir)


def _nothing(*args: Any, **kwargs: Any) -> None:
    """Stand in for what logs or prints."""


def _never() -> bool:
    return False


def _warning(all_gather: Callable[..., Any]) -> Callable[..., Any]:
    def warn_and_gather(*args: Any, **kwargs: Any) -> Any:
        rank_zero_warn(
            "`self.all_gather` in `training_step` runs twice a step under double momentum, since the loss may need it."
        )
        return all_gather(*args, **kwargs)

    return warn_and_gather
