from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.fabric import Fabric
from lightning.fabric.plugins.precision import MixedPrecision
from lightning.fabric.strategies import STRATEGY_REGISTRY, DDPStrategy
from loops import Loop, batches, fabric_of, loss_of
from rank_pool import RankPool
from torch import Tensor, nn
from training import Regression, parameters

from lightning_byzantine.aggregators import CTMA, NNM, Aggregator, GeometricMedian, Mean, PersistentFilter
from lightning_byzantine.fabric import ByzantineDDPStrategy

RULES: list[Aggregator] = [PersistentFilter(), Mean(), CTMA(NNM(GeometricMedian()))]


class FabricLoop:
    """Networks, each trained on its own; keeps all parameters after every step."""

    def __init__(self, strategy: Any, num_networks: int = 1, **arguments: Any) -> None:
        torch.manual_seed(1)
        self.fabric = fabric_of(strategy, **arguments)
        self.state: dict[str, Any] = {}
        for number in range(num_networks):
            network = Regression()
            optimizer = torch.optim.SGD(network.parameters(), lr=0.1, momentum=0.9)
            self.state[f"network{number}"], self.state[f"optimizer{number}"] = self.fabric.setup(network, optimizer)
        self.networks = [self.state[f"network{number}"] for number in range(num_networks)]
        self.history: list[Tensor] = []

    def run(self, steps: list[list[Tensor]], accumulate: int = 1, clip: float | None = None) -> Tensor:
        for step, batch in enumerate(steps, 1):
            is_last = step % accumulate == 0
            for number, network in enumerate(self.networks):
                with self.fabric.no_backward_sync(network, enabled=not is_last):
                    self.fabric.backward(loss_of(network, batch) / accumulate)
                if is_last:
                    optimizer = self.state[f"optimizer{number}"]
                    if clip is not None:
                        self.fabric.clip_gradients(network, optimizer, max_norm=clip)
                    optimizer.step()
                    optimizer.zero_grad()
            if is_last:
                self.history.append(torch.cat([parameters(network) for network in self.networks]))
        return torch.stack(self.history)


def with_and_without_fabric(
    loop: dict[str, Any], fabric: dict[str, Any], ddp: dict[str, Any], **arguments: Any
) -> tuple[Tensor, Tensor]:
    by_fabric = FabricLoop(ByzantineDDPStrategy(**ddp, **arguments), **fabric).run(batches(), **loop)
    return by_fabric, Loop(ddp=ddp, **arguments).run(batches(), **loop)


PAIRS = [
    pytest.param(rule, exchange, id=f"{type(rule).__name__}-{exchange}", marks=() if index < 2 else pytest.mark.slow)
    for index, (exchange, rule) in enumerate(product(["all_gather", "all_to_all"], RULES))
]


@pytest.mark.parametrize(("rule", "exchange"), PAIRS)
def test_trains_like_a_plain_loop(three_ranks: RankPool, rule: Aggregator, exchange: str) -> None:
    results = three_ranks.run(with_and_without_fabric, {}, {}, {}, aggregator=rule, exchange=exchange)
    for by_fabric, plain in results:
        assert torch.equal(by_fabric, plain)
        assert torch.equal(by_fabric, results[0][0])


def test_accumulates_and_clips_like_a_plain_loop(three_ranks: RankPool) -> None:
    loop, ddp = {"accumulate": 3, "clip": 0.1}, {"find_unused_parameters": True, "bucket_cap_mb": 0.0005}
    for by_fabric, plain in three_ranks.run(with_and_without_fabric, loop, {}, ddp):
        assert torch.equal(by_fabric, plain)


def under_precision(**arguments: Any) -> tuple[Tensor, float]:
    stock = FabricLoop(DDPStrategy(), **arguments).run(batches(6))
    own = FabricLoop(ByzantineDDPStrategy(aggregator=Mean()), **arguments).run(batches(6))
    return own, (own - stock).abs().max().item()


@pytest.mark.parametrize(
    "arguments",
    [
        pytest.param({"precision": "bf16-mixed"}, id="bf16-mixed"),
        pytest.param({"precision": "64-true"}, id="64-true"),
    ],
)
def test_trains_like_stock_ddp_with_the_mean(three_ranks: RankPool, arguments: dict[str, Any]) -> None:
    (first, distance), *others = three_ranks.run(under_precision, **arguments)
    assert distance < 1e-5
    assert all(torch.equal(first, other) for other, _ in others)


def under_a_loss_scale() -> tuple[Tensor, Tensor, list[float]]:
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10, growth_interval=2)
    # The forward pass stays in float32, since bfloat16 would hide what the scale does.
    plugin = MixedPrecision("16-mixed", "cpu", scaler=scaler)
    plugin._desired_input_dtype = torch.float32
    loop, scales = FabricLoop(ByzantineDDPStrategy(), plugins=[plugin]), []
    loop.fabric.strategy.hooks[0].observe(lambda report: scales.append(scaler.get_scale()))
    return loop.run(batches(6)), Loop().run(batches(6)), scales


def test_momentum_is_free_of_the_loss_scale(three_ranks: RankPool) -> None:
    for scaled, plain, scales in three_ranks.run(under_a_loss_scale):
        torch.testing.assert_close(scaled, plain, atol=1e-6, rtol=0)
        assert scales == [1024.0, 1024.0, 2048.0, 2048.0, 4096.0, 4096.0]


def resumed_and_not(path: Path, exchange: Any) -> tuple[Tensor, Tensor, dict[str, Any], frozenset[int]]:
    strategy = ByzantineDDPStrategy(exchange=exchange)
    whole, steps = FabricLoop(strategy, num_networks=2), batches()
    whole.run(steps[:5])
    strategy.hooks[1].quarantine([2], proved=True)
    whole.fabric.save(path, whole.state | {"step": 5})
    fresh = ByzantineDDPStrategy(exchange=exchange)
    resumed = FabricLoop(fresh, num_networks=2)
    remainder = resumed.fabric.load(path, resumed.state, weights_only=True)
    return whole.run(steps[5:])[5:], resumed.run(steps[5:]), remainder, fresh.hooks[1].quarantined


@pytest.mark.parametrize("exchange", ["all_gather", pytest.param("all_to_all", marks=pytest.mark.slow)])
def test_several_models_resume_exactly(three_ranks: RankPool, tmp_path: Path, exchange: str) -> None:
    for expected, found, remainder, quarantined in three_ranks.run(resumed_and_not, tmp_path / "last.ckpt", exchange):
        assert torch.equal(found, expected)
        assert remainder == {"step": 5}
        assert quarantined == {2}


def checkpoints(folder: Path) -> tuple[list[str], list[str], str]:
    loop = FabricLoop(ByzantineDDPStrategy())
    loop.run(batches(2))
    loop.fabric.save(folder / "numbers.ckpt", {"step": 2})
    loop.fabric.save(folder / "all.ckpt", loop.state)
    without_state = list(loop.fabric.load(folder / "numbers.ckpt"))
    whole = list(loop.fabric.load(folder / "all.ckpt"))
    other = FabricLoop(ByzantineDDPStrategy(estimator=None))
    try:
        other.fabric.load(folder / "all.ckpt", other.state)
    except ValueError as error:
        FabricLoop(ByzantineDDPStrategy(estimator=None, restart_estimator=True)).fabric.load(
            folder / "all.ckpt", other.state
        )
        return without_state, whole, str(error)
    return without_state, whole, "no error"


def test_workers_states_are_saved_with_their_models(three_ranks: RankPool, tmp_path: Path) -> None:
    for without_state, whole, error in three_ranks.run(checkpoints, tmp_path):
        assert without_state == ["step"]
        assert whole == ["network0", "optimizer0", "byzantine_ddp"]
        assert "differ in the estimator" in error
        assert "restart_estimator=True" in error


NAMES_OF_DDP = [name for name, entry in STRATEGY_REGISTRY.items() if entry["strategy"] is DDPStrategy]


def test_fabric_registers_these_names_for_ddp() -> None:
    endings = ["", "_spawn", "_fork", "_notebook", "_find_unused_parameters_true"]
    assert set(NAMES_OF_DDP) == {f"ddp{ending}" for ending in endings}


@pytest.mark.parametrize("name", NAMES_OF_DDP)
def test_every_name_of_ddp_has_its_counterpart(name: str) -> None:
    assert STRATEGY_REGISTRY[f"byzantine_{name}"]["init_params"] == STRATEGY_REGISTRY[name]["init_params"]
    strategy = Fabric(strategy=f"byzantine_{name}", accelerator="cpu", devices=3).strategy
    assert isinstance(strategy, ByzantineDDPStrategy)


def rule_and_exchange(strategy: str) -> tuple[str, str]:
    fabric = fabric_of(strategy)
    fabric.setup(nn.Linear(1, 1))
    (hook,) = fabric.strategy.hooks
    return type(hook.aggregator).__name__, STRATEGY_REGISTRY[strategy]["init_params"].get("exchange", "all_gather")


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("sharded", ("PersistentFilter", "all_to_all")),
        ("ctma", ("CTMA", "all_gather")),
        ("ctma_sharded", ("CTMA", "all_to_all")),
    ],
)
def test_every_variant_has_one_name(three_ranks: RankPool, name: str, expected: tuple[str, str]) -> None:
    assert three_ranks.run(rule_and_exchange, f"byzantine_ddp_{name}") == [expected] * 3


@pytest.mark.parametrize(
    "arguments", [{"aggregator": 3}, {"estimator": 3}, {"exchange": "ring"}, {"on_breakdown": "skip"}], ids=str
)
def test_wrong_arguments_are_named_before_processes_start(arguments: dict[str, Any]) -> None:
    (name,) = arguments
    with pytest.raises((TypeError, ValueError), match=f"{name} must be "):
        ByzantineDDPStrategy(**arguments)


def setup_of_three(**arguments: Any) -> str:
    fabric = fabric_of(ByzantineDDPStrategy(**arguments))
    try:
        fabric.setup(nn.Linear(1, 1))
    except ValueError as error:
        return str(error)
    return "no error"


def test_what_only_the_number_of_workers_shows_is_named_by_setup(three_ranks: RankPool) -> None:
    errors = three_ranks.run(setup_of_three, num_byzantine=2)
    assert errors == ["num_byzantine must satisfy 0 <= f < m / 2, got f=2 with m=3 workers"] * 3


def launched(fabric: Fabric) -> list[float]:
    network, optimizer = fabric.setup(*_network_and_optimizer())
    # One worker of three goes uphill.
    fabric.backward((-10.0 if fabric.global_rank == 1 else 1.0) * network(torch.ones(4, 2)).mean())
    optimizer.step()
    return parameters(network).tolist()


def _network_and_optimizer() -> tuple[nn.Module, torch.optim.Optimizer]:
    network = nn.Linear(2, 1)
    nn.init.zeros_(network.weight)
    nn.init.zeros_(network.bias)
    return network, torch.optim.SGD(network.parameters(), lr=1.0)


@pytest.mark.slow
@pytest.mark.parametrize("start_method", ["spawn", "fork"])
def test_processes_can_be_started_by_fabric(start_method: str) -> None:
    fabric = Fabric(strategy=f"byzantine_ddp_{start_method}", accelerator="cpu", devices=3)
    assert max(fabric.launch(launched)) < 0
