"""The strategies' names in Fabric's registry, which is not that of the Trainer."""

from collections.abc import Callable
from typing import Any

from lightning.fabric.strategies import STRATEGY_REGISTRY
from lightning.fabric.strategies.ddp import DDPStrategy

from lightning_byzantine.aggregators import CTMA, NNM, GeometricMedian
from lightning_byzantine.fabric.byzantine_ddp import ByzantineDDPStrategy

__all__ = ["register_strategies"]


def _with_ctma(**arguments: Any) -> ByzantineDDPStrategy:
    return ByzantineDDPStrategy(aggregator=CTMA(NNM(GeometricMedian())), **arguments)


_SHARDED = {"exchange": "all_to_all"}
_VARIANTS: dict[str, tuple[Callable[..., ByzantineDDPStrategy], dict[str, Any]]] = {
    "sharded": (ByzantineDDPStrategy, _SHARDED),
    "ctma": (_with_ctma, {}),
    "ctma_sharded": (_with_ctma, _SHARDED),
}


def register_strategies() -> None:
    """Register ``byzantine_ddp`` with every suffix that Fabric has for ``ddp``, and its variants.

    - ``byzantine_ddp``, ``byzantine_ddp_spawn``, ``byzantine_ddp_fork``, ``byzantine_ddp_notebook`` and
      ``byzantine_ddp_find_unused_parameters_true``;
    - ``byzantine_ddp_sharded``: ``exchange="all_to_all"``;
    - ``byzantine_ddp_ctma`` and ``byzantine_ddp_ctma_sharded``: ``aggregator=CTMA(NNM(GeometricMedian()))``.
    """
    for name, entry in list(STRATEGY_REGISTRY.items()):
        if name.startswith("ddp") and entry["strategy"] is DDPStrategy:
            _register(f"byzantine_{name}", ByzantineDDPStrategy, entry["description"], **entry["init_params"])
    for name, (strategy, arguments) in _VARIANTS.items():
        _register(f"byzantine_ddp_{name}", strategy, f"DDP strategy, {name.replace('_', ' ')}", **arguments)


def _register(name: str, strategy: Callable[..., ByzantineDDPStrategy], description: str, **arguments: Any) -> None:
    STRATEGY_REGISTRY.register(name, strategy, f"Byzantine-robust {description}", override=True, **arguments)
