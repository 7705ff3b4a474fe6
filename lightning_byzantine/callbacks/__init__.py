"""Lightning callbacks."""

from lightning_byzantine.callbacks.byzantine_simulation import ByzantineSimulation

__all__ = ["ByzantineSimulation"]
