"""The strategies' names in Lightning's registry."""

from collections.abc import Callable
from typing import Any

from lightning.pytorch.strategies import DDPStrategy, Strategy, StrategyRegistry

from lightning_byzantine.aggregators import CTMA, NNM, GeometricMedian
from lightning_byzantine.optim import DoubleMomentumEstimator
from lightning_byzantine.strategies.byzantine_ddp import ByzantineDDPStrategy
from lightning_byzantine.strategies.sharded.byzantine_model_parallel import ByzantineModelParallelStrategy

__all__ = ["register_strategies"]


def _with_double_momentum(**arguments: Any) -> ByzantineDDPStrategy:
    # A new estimator each time, because an argument in the registry would be shared by all strategies of that name. The
    # paper's alpha_t = t would require dividing the learning rate of the user's optimizer by the number of steps.
    estimator = DoubleMomentumEstimator(min_beta=0.05, min_gamma=0.05, weighted=False)
    return ByzantineDDPStrategy(estimator=estimator, **arguments)


def _with_ctma(**arguments: Any) -> ByzantineDDPStrategy:
    return ByzantineDDPStrategy(aggregator=CTMA(NNM(GeometricMedian())), **arguments)


_SHARDED = {"exchange": "all_to_all"}
_VARIANTS: dict[str, tuple[Callable[..., ByzantineDDPStrategy], dict[str, Any]]] = {
    "sharded": (ByzantineDDPStrategy, _SHARDED),
    "double_momentum": (_with_double_momentum, {}),
    "double_momentum_sharded": (_with_double_momentum, _SHARDED),
    "ctma": (_with_ctma, {}),
    "ctma_sharded": (_with_ctma, _SHARDED),
    "shadow": (ByzantineDDPStrategy, {"shadow": True}),
    "shadow_sharded": (ByzantineDDPStrategy, {"shadow": True} | _SHARDED),
}


def register_strategies() -> None:
    """Register ``byzantine_ddp``, with every suffix that Lightning has for ``ddp``, and its variants.

    - ``byzantine_ddp``, ``byzantine_ddp_spawn``, ``byzantine_ddp_fork`` and ``byzantine_ddp_notebook``, each also with
      the suffix ``_find_unused_parameters_false`` or ``_find_unused_parameters_true``;
    - ``byzantine_ddp_sharded``: ``exchange="all_to_all"``;
    - ``byzantine_ddp_double_momentum`` and ``byzantine_ddp_double_momentum_sharded``:
      ``estimator=DoubleMomentumEstimator(min_beta=0.05, min_gamma=0.05, weighted=False)``;
    - ``byzantine_ddp_ctma`` and ``byzantine_ddp_ctma_sharded``: ``aggregator=CTMA(NNM(GeometricMedian()))``, the
      paper's composition;
    - ``byzantine_ddp_shadow`` and ``byzantine_ddp_shadow_sharded``: ``shadow=True``;
    - ``byzantine_fsdp``: :class:`ByzantineModelParallelStrategy`, with each node as one worker.

    Pass other arguments, such as ``start_method="spawn"`` for a variant, to :class:`ByzantineDDPStrategy` itself.
    """
    for name, entry in list(StrategyRegistry.items()):
        if name.startswith("ddp") and entry["strategy"] is DDPStrategy:
            _register(f"byzantine_{name}", ByzantineDDPStrategy, entry["description"], **entry["init_params"])
    for name, (strategy, arguments) in _VARIANTS.items():
        _register(f"byzantine_ddp_{name}", strategy, f"DDP strategy, {name.replace('_', ' ')}", **arguments)
    _register("byzantine_fsdp", ByzantineModelParallelStrategy, "FSDP2 strategy, across replicas")


def _register(name: str, strategy: Callable[..., Strategy], description: str, **arguments: Any) -> None:
    StrategyRegistry.register(name, strategy, f"Byzantine-robust {description}", override=True, **arguments)
