"""What the strategy refuses, as early as it can be known, and in one sentence."""

from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.strategies import StrategyRegistry
from rank_pool import RankPool
from sharded_models import Sharded, train
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from lightning_byzantine import ByzantineModelParallelStrategy
from lightning_byzantine.aggregators import CTMA, CenteredClipping, Krum
from lightning_byzantine.optim import DoubleMomentum, DoubleMomentumEstimator
from lightning_byzantine.strategies.sharded.layout import layout_of


def trainer_of(strategy: Any, devices: int = 8) -> pl.Trainer:
    return pl.Trainer(strategy=strategy, accelerator="cpu", devices=devices, logger=False)


@pytest.mark.parametrize(
    "arguments",
    [
        {"shadow": True},
        {"workers_per_process": 2},
        {"on_worker_error": "exclude"},
        {"robust_buffers": True},
        {"robust_metrics": True},
        {"check_consistency_every_n_steps": 5},
    ],
    ids=lambda arguments: next(iter(arguments)),
)
def test_refuses_what_needs_ddp(arguments: dict[str, Any]) -> None:
    with pytest.raises(MisconfigurationException, match=f"can't take `{next(iter(arguments))}`, which "):
        ByzantineModelParallelStrategy(4, 2, **arguments)


def test_refuses_rules_and_estimators_whose_state_can_not_be_divided() -> None:
    with pytest.raises(MisconfigurationException, match="can't take DoubleMomentumEstimator"):
        ByzantineModelParallelStrategy(4, 2, estimator=DoubleMomentumEstimator())
    with pytest.raises(MisconfigurationException, match="starts from the previous aggregate"):
        ByzantineModelParallelStrategy(4, 2, aggregator=CTMA(CenteredClipping()))


@pytest.mark.parametrize(
    ("sizes", "error", "message"),
    [
        ((3, 2), ValueError, "got 3 \\* 2 \\* 1 with 8 processes"),
        ((4, "auto", 3), ValueError, "got 4 \\* 1 \\* 3 with 8 processes"),
        (("auto", "auto"), MisconfigurationException, "Say how many replicas there are: replicate_size=4"),
    ],
)
def test_sizes_are_those_of_the_processes(sizes: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        trainer_of(ByzantineModelParallelStrategy(*sizes))


@pytest.mark.parametrize("size", [0, -1, 2.5, "two"])
def test_sizes_are_positive_numbers(size: Any) -> None:
    with pytest.raises((TypeError, ValueError), match="data_parallel_size must be"):
        ByzantineModelParallelStrategy(4, size)


def test_the_rule_is_asked_about_replicas() -> None:
    with pytest.raises(ValueError, match="got f=2 with m=4 workers"):
        trainer_of(ByzantineModelParallelStrategy(4, 2, aggregator=Krum(), num_byzantine=2))


@pytest.mark.parametrize(
    ("sizes", "shape"),
    [((4,), (4, 2, 1)), (("auto", 4), (2, 4, 1)), ((2, "auto", 2), (2, 2, 2)), ((8,), (8, 1, 1))],
)
def test_a_size_that_is_not_given_is_what_is_left(sizes: Any, shape: tuple[int, int, int]) -> None:
    strategy = ByzantineModelParallelStrategy(*sizes)
    trainer_of(strategy)
    assert strategy.shape == shape
    assert strategy.num_workers == shape[0]


def test_by_its_name_each_node_is_a_worker() -> None:
    trainer = pl.Trainer(strategy="byzantine_fsdp", accelerator="cpu", devices=2, num_nodes=3, logger=False)
    assert isinstance(trainer.strategy, ByzantineModelParallelStrategy)
    assert trainer.strategy.shape == (3, 2, 1)
    assert StrategyRegistry["byzantine_fsdp"]["description"]


class Manual(Sharded):
    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False


class WithDoubleMomentum(Sharded):
    def configure_optimizers(self) -> torch.optim.Optimizer:
        return DoubleMomentum(super().configure_optimizers())


def refused(model: type[Sharded]) -> str:
    with pytest.raises(MisconfigurationException) as caught:
        train(ByzantineModelParallelStrategy(1, 1), model(), num_steps=1)
    return str(caught.value)


def test_manual_optimization_and_double_momentum_are_refused(one_rank: RankPool) -> None:
    assert "needs automatic optimization" in one_rank.run(refused, Manual)[0]
    assert "DoubleMomentum needs a second pass" in one_rank.run(refused, WithDoubleMomentum)[0]


def errors_of_layouts() -> list[str]:
    """Return what is said of models of which a gradient would bypass the rule."""
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("replicate", "data_parallel"))
    own, everyone = mesh["data_parallel"], init_device_mesh("cpu", (4,), mesh_dim_names=("data_parallel",))
    first = torch.distributed.get_rank() // 2 * 2
    found = []
    for name in ("partly", "over all", "complex"):
        module = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))
        if name == "complex":
            module.phase = nn.Parameter(torch.zeros(4, dtype=torch.cfloat))
        fully_shard(module[0] if name == "partly" else module, mesh=everyone if name == "over all" else own)
        with pytest.raises(MisconfigurationException) as caught:
            layout_of(module, range(first, first + 2), (2, 2, 1), own.get_group(), torch.device("cpu"))
        found.append(str(caught.value))
    return found


def test_models_whose_gradients_would_bypass_the_rule_are_refused(four_ranks: RankPool) -> None:
    for partly, over_all, of_complex in four_ranks.run(errors_of_layouts):
        assert "The parameter '1.weight' is trained, but `fully_shard` was not applied" in partly
        assert "The parameter '0.weight' is divided among ranks of several replicas" in over_all
        assert "The parameter 'phase' is complex" in of_complex
