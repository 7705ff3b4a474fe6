"""A training step without side effects."""

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

import lightning.pytorch as pl
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.loggers import Logger
from lightning.pytorch.loggers.logger import DummyLogger
from lightning.pytorch.utilities import rank_zero_warn
from torch import nn
from torchmetrics import Metric

from lightning_byzantine.strategies.lightning_internals import results_of
from lightning_byzantine.strategies.second_pass.snapshot import Snapshot
from lightning_byzantine.utilities.replacing import replaced
from lightning_byzantine.utilities.rng import replayed_rng

__all__ = ["isolated"]


@contextmanager
def isolated(module: pl.LightningModule, batch: Any, gather: Callable[..., Any] | None = None) -> Iterator[Snapshot]:
    """Undo at the end everything that a training step does besides computing its loss.

    That is: random numbers, the state of the module and its submodules (buffers, metrics, attributes), and containers
    in the batch. Logging and printing do nothing within the block.

    Args:
        module: the module that runs the step.
        batch: the arguments of the step; their tensors must not be written to.
        gather: what ``self.all_gather`` calls within the block; None to gather as always, with a warning.

    Yields:
        The state of the module before the step.

    Raises:
        MisconfigurationException: if the step writes to a tensor of its batch, or to a trainable parameter, by one of
            torch's in-place operations.

    """
    trainer = module.trainer
    own, handed_in = Snapshot(module), Snapshot(batch, copy_tensors=False)
    with ExitStack() as stack:
        stack.enter_context(replayed_rng(module.device))
        stack.callback(own.restore)
        stack.callback(handed_in.restore)
        stack.callback(setattr, trainer, "loggers", trainer.loggers)
        trainer.loggers = [_SilentLogger(logger) for logger in trainer.loggers]
        # For modules that keep a reference to `self.log`, which is replaced below.
        if (results := results_of(trainer)) is not None:
            stack.enter_context(replaced(results, log=_nothing))
        for part in own.modules:
            if isinstance(part, pl.LightningModule):
                all_gather = partial(_warn_and_gather, part.all_gather) if gather is None else gather
                stack.enter_context(replaced(part, log=_nothing, print=_nothing, all_gather=all_gather))
            elif isinstance(part, Metric):
                stack.enter_context(replaced(part, distributed_available_fn=lambda: False))
        yield own
        if handed_in.changed:
            raise MisconfigurationException(
                "Double momentum runs `training_step` twice on each batch, but this one writes to a tensor of its batch"
                f" in place, of shape {tuple(handed_in.changed[0].shape)}. Write `x = x + noise` instead of"
                " `x += noise`, for example."
            )
        if any(isinstance(tensor, nn.Parameter) for tensor in own.changed):
            raise MisconfigurationException(
                "Double momentum runs `training_step` at two points, but this one writes to a parameter. Do that in"
                " `on_train_batch_end`."
            )


class _SilentLogger(DummyLogger):
    """Has the name and directories of another logger, and logs nothing."""

    def __init__(self, logger: Logger) -> None:
        super().__init__()
        self._logger = logger

    name = property(lambda self: self._logger.name)
    version = property(lambda self: self._logger.version)
    save_dir = property(lambda self: self._logger.save_dir)
    root_dir = property(lambda self: self._logger.root_dir)
    log_dir = property(lambda self: self._logger.log_dir)


def _nothing(*args: Any, **kwargs: Any) -> None:
    """Do nothing, whatever the arguments."""


def _warn_and_gather(all_gather: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    rank_zero_warn(
        "`self.all_gather` in `training_step` runs twice a step under double momentum, since the loss may need it."
    )
    return all_gather(*args, **kwargs)
