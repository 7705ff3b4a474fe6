"""The ready-made command line, for people who have no script: ``python -m lightning_byzantine``."""

from lightning.pytorch.cli import LightningCLI

import lightning_byzantine.callbacks  # noqa: F401  (makes class names such as `SignFlip` known to the parser)

if __name__ == "__main__":
    LightningCLI()
