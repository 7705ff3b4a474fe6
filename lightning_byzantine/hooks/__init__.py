"""Robust aggregation for training loops of your own, without Lightning."""

from lightning_byzantine.hooks.robust_ddp import robust_ddp
from lightning_byzantine.hooks.robust_hook import RobustHook

__all__ = ["RobustHook", "robust_ddp"]
