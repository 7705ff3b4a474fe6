"""Private names of Lightning that the strategies can't do without, each with its reason."""

# The forward of DDP runs the training step through it, and is where the second pass of double momentum belongs.
# Optimizers' states go to the CPU with it when a run ends, as Lightning does with those it knows.
from lightning.fabric.utilities.optimizer import _optimizer_to_device
from lightning.pytorch.strategies.ddp import _DDPForwardRedirection

__all__ = ["_DDPForwardRedirection", "_optimizer_to_device"]
