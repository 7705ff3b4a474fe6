import pytest
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import Trainer
from lightning.pytorch.strategies import StrategyRegistry
from lightning.pytorch.strategies.launchers import _MultiProcessingLauncher, _SubprocessScriptLauncher
from rank_pool import RankPool

from lightning_byzantine import ByzantineDDPStrategy
from lightning_byzantine.strategies.registry import register_strategies

START_METHODS = {"": "popen", "_spawn": "spawn", "_fork": "fork", "_notebook": "fork"}
LAUNCHERS = {suffix: _MultiProcessingLauncher if suffix else _SubprocessScriptLauncher for suffix in START_METHODS}


@pytest.mark.parametrize("unused", [False, True])
@pytest.mark.parametrize("suffix", START_METHODS)
@pytest.mark.parametrize("sharded", [False, True])
@pytest.mark.parametrize("shadow", [False, True])
def test_every_variant_is_registered_and_described(shadow: bool, sharded: bool, suffix: str, unused: bool) -> None:
    name = (
        "byzantine_ddp" + "_shadow" * shadow + "_sharded" * sharded + suffix + "_find_unused_parameters_true" * unused
    )
    entry = StrategyRegistry[name]
    assert f"'{START_METHODS[suffix]}'" in entry["description"]
    assert ("`find_unused_parameters` as True" in entry["description"]) == unused
    assert entry["init_params"].get("find_unused_parameters", False) == unused
    assert ("'all_to_all'" in entry["description"]) == sharded
    trainer = Trainer(strategy=name, accelerator="cpu", devices=3, logger=False)
    assert isinstance(trainer.strategy, ByzantineDDPStrategy)
    assert trainer.strategy.shadow == shadow
    assert trainer.strategy.exchange == ("all_to_all" if sharded else "all_gather")
    assert isinstance(trainer.strategy.launcher, LAUNCHERS[suffix])


def trainer_of_pytorch_lightning() -> str:
    import pytorch_lightning as other

    register_strategies()  # as importing lightning_byzantine after pytorch_lightning does
    with pytest.raises(MisconfigurationException) as caught:
        other.Trainer(strategy="byzantine_ddp", accelerator="cpu", devices=1, logger=False)
    return str(caught.value)


def test_pytorch_lightning_is_told_what_to_import(one_rank: RankPool) -> None:
    message = one_rank.run(trainer_of_pytorch_lightning)[0]
    assert "needs a Trainer of `lightning.pytorch`, got one of `pytorch_lightning`" in message
