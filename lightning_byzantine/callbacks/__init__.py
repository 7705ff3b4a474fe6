"""Lightning callbacks."""

from lightning_byzantine.callbacks.byzantine_monitor import ByzantineMonitor
from lightning_byzantine.callbacks.byzantine_simulation import ByzantineSimulation

__all__ = ["ByzantineMonitor", "ByzantineSimulation"]
