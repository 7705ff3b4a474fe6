import pytest
from lightning.pytorch import Trainer
from lightning.pytorch.strategies import StrategyRegistry

from lightning_byzantine import ByzantineDDPStrategy

START_METHODS = {"": "popen", "_spawn": "spawn", "_fork": "fork", "_notebook": "fork"}


@pytest.mark.parametrize("unused", [False, True])
@pytest.mark.parametrize("suffix", START_METHODS)
def test_every_variant_is_registered_and_described(suffix: str, unused: bool) -> None:
    name = f"byzantine_ddp{suffix}" + "_find_unused_parameters_true" * unused
    entry = StrategyRegistry[name]
    assert f"'{START_METHODS[suffix]}'" in entry["description"]
    assert ("`find_unused_parameters` as True" in entry["description"]) == unused
    trainer = Trainer(strategy=name, accelerator="cpu", devices=3, logger=False)
    assert isinstance(trainer.strategy, ByzantineDDPStrategy)
    assert trainer.strategy._start_method == START_METHODS[suffix]
    assert trainer.strategy._ddp_kwargs == ({"find_unused_parameters": True} if unused else {})
