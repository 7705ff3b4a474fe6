from typing import Any

import pytest
from lightning.pytorch import Trainer
from lightning.pytorch.strategies import DDPStrategy, StrategyRegistry
from rank_pool import RankPool

from lightning_byzantine import ByzantineDDPStrategy
from lightning_byzantine.aggregators import CTMA, PersistentFilter
from lightning_byzantine.estimators import WorkerMomentum
from lightning_byzantine.optim import DoubleMomentumEstimator
from lightning_byzantine.strategies.registry import register_strategies

NAMES_OF_DDP = [name for name, entry in StrategyRegistry.items() if entry["strategy"] is DDPStrategy]
VARIANTS: dict[str, dict[str, Any]] = {
    "sharded": {"exchange": "all_to_all"},
    "double_momentum": {"estimator": DoubleMomentumEstimator},
    "double_momentum_sharded": {"estimator": DoubleMomentumEstimator, "exchange": "all_to_all"},
    "ctma": {"aggregator": CTMA},
    "ctma_sharded": {"aggregator": CTMA, "exchange": "all_to_all"},
    "shadow": {"shadow": True},
    "shadow_sharded": {"shadow": True, "exchange": "all_to_all"},
}


def strategy_of(name: str) -> Any:
    return Trainer(strategy=name, accelerator="cpu", devices=3, logger=False).strategy


def test_lightning_registers_these_names_for_ddp() -> None:
    start_methods, endings = ["", "_spawn", "_fork", "_notebook"], ["", "_false", "_true"]
    unused = ["_find_unused_parameters" + ending if ending else "" for ending in endings]
    assert set(NAMES_OF_DDP) == {f"ddp{start}{ending}" for start in start_methods for ending in unused}


@pytest.mark.parametrize("name", NAMES_OF_DDP)
def test_every_name_of_ddp_has_its_counterpart(name: str) -> None:
    entry, ddp = StrategyRegistry[f"byzantine_{name}"], StrategyRegistry[name]
    assert entry["init_params"] == ddp["init_params"]
    assert entry["description"] == f"Byzantine-robust {ddp['description']}"
    strategy, expected = strategy_of(f"byzantine_{name}"), strategy_of(name)
    assert isinstance(strategy, ByzantineDDPStrategy)
    assert (strategy.exchange, strategy.shadow) == ("all_gather", False)
    assert type(strategy.launcher) is type(expected.launcher)


@pytest.mark.parametrize("name", VARIANTS)
def test_every_variant_has_one_name(name: str) -> None:
    strategy, expected = strategy_of(f"byzantine_ddp_{name}"), VARIANTS[name]
    assert isinstance(strategy, ByzantineDDPStrategy)
    assert isinstance(strategy.aggregator, expected.get("aggregator", PersistentFilter))
    assert isinstance(strategy.estimator, expected.get("estimator", WorkerMomentum))
    assert strategy.exchange == expected.get("exchange", "all_gather")
    assert strategy.shadow == expected.get("shadow", False)
    assert StrategyRegistry[f"byzantine_ddp_{name}"]["description"]


def test_there_are_no_other_names() -> None:
    ours = {name for name in StrategyRegistry if "byzantine" in name}
    of_ddp = {f"byzantine_{name}" for name in NAMES_OF_DDP} | {f"byzantine_ddp_{name}" for name in VARIANTS}
    assert ours == of_ddp | {"byzantine_fsdp"}
    register_strategies()
    assert ours == {name for name in StrategyRegistry if "byzantine" in name}


def test_strategies_of_one_name_share_no_estimator() -> None:
    name = "byzantine_ddp_double_momentum"
    assert strategy_of(name).estimator is not strategy_of(name).estimator


def trainer_of_pytorch_lightning() -> str:
    import pytorch_lightning as other

    with pytest.raises(ValueError) as caught:
        other.Trainer(strategy="byzantine_ddp", accelerator="cpu", devices=1, logger=False)
    return str(caught.value)


def test_the_trainer_of_pytorch_lightning_does_not_know_the_names(one_rank: RankPool) -> None:
    assert "invalid strategy name: `strategy='byzantine_ddp'`" in one_rank.run(trainer_of_pytorch_lightning)[0]
