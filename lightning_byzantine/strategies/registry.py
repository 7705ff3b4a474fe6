"""The strategies' names in Lightning's registry."""

import sys
from collections.abc import Callable
from itertools import product
from typing import Any, NoReturn

from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.strategies import StrategyRegistry

from lightning_byzantine.optim import DoubleMomentumEstimator
from lightning_byzantine.strategies.byzantine_ddp import ByzantineDDPStrategy

__all__ = ["register_strategies"]

_EXCHANGES: dict[str, dict[str, Any]] = {"": {}, "_sharded": {"exchange": "all_to_all"}}
_START_METHODS = {"": "popen", "_spawn": "spawn", "_fork": "fork", "_notebook": "fork"}


def register_strategies() -> None:
    """Register ``byzantine_ddp`` and its variants, named as Lightning names those of ``ddp``."""
    kinds = {"": ByzantineDDPStrategy, "_double_momentum": _with_double_momentum, "_shadow": _shadow}
    descriptions = {
        "": "with Byzantine-robust aggregation",
        "_double_momentum": "with Byzantine-robust aggregation of double momentum",
        "_shadow": "that watches what Byzantine-robust aggregation would do",
    }
    for (kind, strategy), (sharded, exchange), (suffix, start_method) in product(
        kinds.items(), _EXCHANGES.items(), _START_METHODS.items()
    ):
        name = f"byzantine_ddp{kind}{sharded}{suffix}"
        description = f"DDP {descriptions[kind]} and `start_method` '{start_method}'"
        if sharded:
            description += ", by `exchange` 'all_to_all'"
        _register(name, strategy, description, start_method=start_method, **exchange)
        _register(
            f"{name}_find_unused_parameters_true",
            strategy,
            f"{description}, and `find_unused_parameters` as True",
            start_method=start_method,
            find_unused_parameters=True,
            **exchange,
        )


def _register(name: str, strategy: Callable[..., ByzantineDDPStrategy], description: str, **arguments: Any) -> None:
    StrategyRegistry.register(name, strategy, description, override=True, **arguments)
    other_package = sys.modules.get("pytorch_lightning")
    if other_package is not None:
        registry = other_package.strategies.StrategyRegistry
        registry.register(name, _refuse_pytorch_lightning, description, override=True)


def _with_double_momentum(**arguments: Any) -> ByzantineDDPStrategy:
    # Made anew, for a registry's argument would be shared by all strategies of that name. The paper's own weights,
    # alpha_t = t, would ask for a learning rate divided by the number of steps, but the optimizer is the user's.
    estimator = DoubleMomentumEstimator(min_beta=0.05, min_gamma=0.05, weighted=False)
    return ByzantineDDPStrategy(estimator=estimator, **arguments)


def _shadow(**arguments: Any) -> ByzantineDDPStrategy:
    return ByzantineDDPStrategy(shadow=True, **arguments)


def _refuse_pytorch_lightning() -> NoReturn:
    raise MisconfigurationException(
        "strategy='byzantine_ddp' needs a Trainer of `lightning.pytorch`, got one of `pytorch_lightning`."
        " Import `lightning.pytorch` everywhere."
    )
