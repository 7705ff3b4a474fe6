"""Robust aggregation for training loops of your own, without Lightning."""

from lightning_byzantine.hooks.ddp_hook import DDPHook
from lightning_byzantine.hooks.fsdp_hook import FSDPHook
from lightning_byzantine.hooks.robust_ddp import robust_ddp
from lightning_byzantine.hooks.robust_fsdp import robust_fsdp

__all__ = ["DDPHook", "FSDPHook", "robust_ddp", "robust_fsdp"]
