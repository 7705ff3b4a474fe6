"""The ready-made command line, for people who have no script."""

from lightning.pytorch.cli import LightningCLI

import lightning_byzantine.callbacks  # noqa: F401  (makes class names such as `SignFlip` known to the parser)

__all__ = ["main"]


def main() -> None:
    """Run LightningCLI on any LightningModule: ``python -m lightning_byzantine fit --model my.Module ...``."""
    LightningCLI()
