"""Robust aggregation for Lightning Fabric: ``Fabric(strategy="byzantine_ddp")``."""

from lightning_byzantine.fabric.byzantine_ddp import ByzantineDDPStrategy

__all__ = ["ByzantineDDPStrategy"]
