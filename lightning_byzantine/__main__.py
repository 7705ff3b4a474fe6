"""``python -m lightning_byzantine``."""

from lightning_byzantine.cli import main

main()
