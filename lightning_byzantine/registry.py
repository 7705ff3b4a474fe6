"""The strategies' names in Lightning's registry."""

import sys
from itertools import product
from typing import Any, NoReturn

from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.strategies import StrategyRegistry

from lightning_byzantine.strategy import ByzantineDDPStrategy

__all__ = ["register_strategies"]

_EXCHANGES: dict[str, dict[str, Any]] = {"": {}, "_sharded": {"exchange": "all_to_all"}}
_START_METHODS = {"": "popen", "_spawn": "spawn", "_fork": "fork", "_notebook": "fork"}


def register_strategies() -> None:
    """Register ``byzantine_ddp`` and its variants, named as Lightning names those of ``ddp``."""
    for (sharded, exchange), (suffix, start_method) in product(_EXCHANGES.items(), _START_METHODS.items()):
        name = f"byzantine_ddp{sharded}{suffix}"
        description = f"DDP with Byzantine-robust aggregation and `start_method` '{start_method}'"
        if sharded:
            description += ", by `exchange` 'all_to_all'"
        _register(name, description, start_method=start_method, **exchange)
        _register(
            f"{name}_find_unused_parameters_true",
            f"{description}, and `find_unused_parameters` as True",
            start_method=start_method,
            find_unused_parameters=True,
            **exchange,
        )


def _register(name: str, description: str, **arguments: Any) -> None:
    StrategyRegistry.register(name, ByzantineDDPStrategy, description, override=True, **arguments)
    other_package = sys.modules.get("pytorch_lightning")
    if other_package is not None:
        registry = other_package.strategies.StrategyRegistry
        registry.register(name, _refuse_pytorch_lightning, description, override=True)


def _refuse_pytorch_lightning() -> NoReturn:
    raise MisconfigurationException(
        "strategy='byzantine_ddp' needs a Trainer of `lightning.pytorch`, got one of `pytorch_lightning`."
        " Import `lightning.pytorch` everywhere."
    )
