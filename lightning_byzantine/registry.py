"""The strategies' names in Lightning's registry."""

from lightning.pytorch.strategies import StrategyRegistry

from lightning_byzantine.strategy import ByzantineDDPStrategy

__all__ = ["register_strategies"]

_START_METHODS = {"": "popen", "_spawn": "spawn", "_fork": "fork", "_notebook": "fork"}


def register_strategies() -> None:
    """Register ``byzantine_ddp`` and its variants, named as Lightning names those of ``ddp``."""
    for suffix, start_method in _START_METHODS.items():
        name = f"byzantine_ddp{suffix}"
        description = f"DDP with Byzantine-robust aggregation and `start_method` '{start_method}'"
        StrategyRegistry.register(name, ByzantineDDPStrategy, description, override=True, start_method=start_method)
        StrategyRegistry.register(
            f"{name}_find_unused_parameters_true",
            ByzantineDDPStrategy,
            f"{description}, and `find_unused_parameters` as True",
            override=True,
            start_method=start_method,
            find_unused_parameters=True,
        )
