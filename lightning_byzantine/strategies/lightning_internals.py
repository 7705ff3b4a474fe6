"""Private names of Lightning that the strategies and callbacks need, each with its reason."""

from typing import Any

import lightning.pytorch as pl

# Distinguish local paths from URLs of remote file systems in the same way as Lightning's own checkpoints do.
from lightning.fabric.utilities.cloud_io import _is_local_file_protocol, get_filesystem

# The file that tells a distributed checkpoint, which is a folder, from others.
from lightning.fabric.utilities.load import _METADATA_FILENAME

# Moves the states of optimizers to the CPU when a run ends, as Lightning does with the optimizers that it knows.
from lightning.fabric.utilities.optimizer import _optimizer_to_device

# Base class of asynchronous checkpoints, which have another CheckpointIO inside that can be replaced.
from lightning.pytorch.plugins.io.wrapper import _WrappingCheckpointIO

# Runs the training step within DDP's forward: the place for the second pass of double momentum.
from lightning.pytorch.strategies.ddp import _DDPForwardRedirection

__all__ = [
    "_METADATA_FILENAME",
    "_DDPForwardRedirection",
    "_WrappingCheckpointIO",
    "_is_local_file_protocol",
    "_optimizer_to_device",
    "get_filesystem",
    "position_of",
    "results_of",
    "skips_backward",
]


def position_of(trainer: pl.Trainer) -> str:
    """Return where the run is, which is the same on all ranks when they meet in a collective."""
    stage = trainer.state.stage
    if stage is None:
        return "before the first batch"
    if not trainer.training:
        return stage.value  # where ranks can have different numbers of batches
    batch = trainer.fit_loop.batch_idx
    return f"{stage.value}, epoch {trainer.current_epoch}, {f'batch {batch}' if batch >= 0 else 'before batch 0'}"


def results_of(trainer: pl.Trainer) -> Any:
    """Return the collection in which ``self.log`` keeps values during a step; None outside of loops.

    It shows which values are synchronized within the step, and receives what modules log through a saved ``self.log``.
    """
    return trainer._results


def skips_backward(trainer: pl.Trainer) -> bool:
    """Return whether the current epoch has no backward, like the last one of StochasticWeightAveraging."""
    return bool(trainer.fit_loop.epoch_loop.automatic_optimization._skip_backward)
