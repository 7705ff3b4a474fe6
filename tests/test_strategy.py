import pickle
import warnings
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any
from unittest import mock

import lightning.pytorch as pl
import pytest
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.plugins.precision import MixedPrecision
from lightning.pytorch.strategies import DDPStrategy
from rank_pool import RankPool
from torch import Tensor, nn
from training import Regression, fit, loader, trainer

from lightning_byzantine import ByzantineBreakdownError, ByzantineDDPStrategy
from lightning_byzantine.aggregators import (
    CTMA,
    NNM,
    Aggregator,
    Bucketing,
    CenteredClipping,
    CoordinateWiseMedian,
    CoordinateWiseTrimmedMean,
    GeometricMedian,
    Krum,
    Mean,
    MultiKrum,
)
from lightning_byzantine.estimators import WorkerMomentum


class UnusedOnSomeRanks(Regression):
    """One layer that rank 1 never uses, one that nobody uses on odd batches, and one that is frozen."""

    def __init__(self, optimizer: str = "SGD") -> None:
        super().__init__(optimizer)
        self.not_on_rank_1 = nn.Linear(8, 1)
        self.on_even_batches = nn.Linear(8, 1)
        self.frozen = nn.Linear(8, 1).requires_grad_(False)
        self.batch_idx = 0

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        self.batch_idx = batch_idx
        return super().training_step(batch, batch_idx)

    def forward(self, inputs: Tensor) -> Tensor:
        outputs = self.network(inputs) + self.frozen(inputs)
        if self.global_rank != 1:
            outputs = outputs + self.not_on_rank_1(inputs)
        if self.batch_idx % 2 == 0:
            outputs = outputs + self.on_even_batches(inputs)
        return outputs


class MixedDtypes(Regression):
    """A float64 layer between float32 ones, so that DDP makes buckets of both."""

    def __init__(self, optimizer: str = "SGD") -> None:
        super().__init__(optimizer)
        self.network[2].double()

    def forward(self, inputs: Tensor) -> Tensor:
        hidden = self.network[1](self.network[0](inputs)).double()
        return self.network[4](self.network[3](self.network[2](hidden)).float())


class BatchNormed(Regression):
    def __init__(self, optimizer: str = "SGD") -> None:
        super().__init__(optimizer)
        self.network = nn.Sequential(nn.Linear(8, 16, bias=False), nn.BatchNorm1d(16), nn.Tanh(), nn.Linear(16, 1))


class CompiledNetwork(Regression):
    def __init__(self, optimizer: str = "SGD") -> None:
        super().__init__(optimizer)
        # The graph is captured and split as ever; only the C++ compiler, minutes on two cores, is left out.
        self.network = torch.compile(self.network, backend="aot_eager")


class TwoOptimizers(Regression):
    """Manual optimization in the manner of a GAN: two networks, each with a backward and an optimizer of its own."""

    def __init__(self, optimizer: str = "SGD") -> None:
        super().__init__(optimizer)
        self.automatic_optimization = False
        self.critic = nn.Linear(9, 1)

    def training_step(self, batch: list[Tensor], batch_idx: int) -> None:
        inputs, targets = batch
        first, second = self.optimizers()
        self.toggle_optimizer(first)
        self.manual_backward(nn.functional.mse_loss(self.network(inputs), targets))
        first.step()
        first.zero_grad()
        self.untoggle_optimizer(first)
        self.toggle_optimizer(second)
        pairs = torch.cat([inputs, self.network(inputs).detach()], dim=1)
        self.manual_backward(self.critic(pairs).square().mean())
        self.clip_gradients(second, gradient_clip_val=0.5)
        second.step()
        second.zero_grad()
        self.untoggle_optimizer(second)

    def configure_optimizers(self) -> list[torch.optim.Optimizer]:
        kind = torch.optim.Adam if self.optimizer == "Adam" else torch.optim.SGD
        return [kind(self.network.parameters(), lr=1e-2), kind(self.critic.parameters(), lr=1e-2)]


# name: model, arguments of the strategy, arguments of the Trainer
COMBINATIONS: dict[str, tuple[type[pl.LightningModule], dict[str, Any], dict[str, Any]]] = {
    "plain": (Regression, {}, {}),
    "many buckets": (Regression, {"bucket_cap_mb": 0.0005}, {}),
    "batch norm": (BatchNormed, {}, {}),
    "find_unused_parameters": (UnusedOnSomeRanks, {"find_unused_parameters": True}, {}),
    "static_graph": (Regression, {"static_graph": True}, {}),
    "gradient_as_bucket_view": (Regression, {"gradient_as_bucket_view": True, "bucket_cap_mb": 0.0005}, {}),
    "accumulate_grad_batches": (Regression, {}, {"accumulate_grad_batches": 3}),
    "accumulation, bucket view": (Regression, {"gradient_as_bucket_view": True}, {"accumulate_grad_batches": 2}),
    "clip by norm": (Regression, {}, {"gradient_clip_val": 0.1}),
    "clip by value": (Regression, {}, {"gradient_clip_val": 0.01, "gradient_clip_algorithm": "value"}),
    "bf16-mixed": (Regression, {}, {"precision": "bf16-mixed"}),
    "64-true": (Regression, {}, {"precision": "64-true"}),
    "mixed dtypes": (MixedDtypes, {}, {}),
    "torch.compile": (CompiledNetwork, {}, {}),
    "manual optimization": (TwoOptimizers, {"find_unused_parameters": True}, {}),
}


def fit_combination(name: str, optimizer: str, strategy: Callable[..., Any], **arguments: Any) -> Tensor:
    model, strategy_arguments, trainer_arguments = COMBINATIONS[name]
    torch.manual_seed(3)
    return fit(strategy(**strategy_arguments, **arguments), model(optimizer), **trainer_arguments)


@pytest.mark.parametrize("name", COMBINATIONS)
@pytest.mark.parametrize("optimizer", ["SGD", "Adam"])
def test_trains_like_stock_ddp_with_the_mean(ranks: RankPool, name: str, optimizer: str) -> None:
    stock = ranks.run(fit_combination, name, optimizer, DDPStrategy)
    raw = ranks.run(fit_combination, name, optimizer, ByzantineDDPStrategy, aggregator=Mean(), estimator=None)
    momentum = ranks.run(fit_combination, name, optimizer, ByzantineDDPStrategy, aggregator=Mean())
    for rank in range(1, ranks.num_ranks):
        assert torch.equal(raw[0], raw[rank])
        assert torch.equal(momentum[0], momentum[rank])
    assert not torch.equal(stock[0][0], stock[0][-1])
    torch.testing.assert_close(raw[0], stock[0], atol=1e-6, rtol=0)
    torch.testing.assert_close(momentum[0], stock[0], atol=1e-5 if optimizer == "SGD" else 1e-4, rtol=0)


RULES: list[Aggregator] = [
    Mean(),
    CoordinateWiseMedian(),
    CoordinateWiseTrimmedMean(),
    GeometricMedian(),
    Krum(),
    MultiKrum(),
    CTMA(CoordinateWiseMedian()),
    CTMA(GeometricMedian()),
    NNM(CoordinateWiseTrimmedMean()),
    Bucketing(GeometricMedian()),
    CTMA(NNM(CoordinateWiseMedian())),
]


@pytest.mark.parametrize("estimator", ["auto", WorkerMomentum(transparent=False), None], ids=repr)
@pytest.mark.parametrize("rule", RULES, ids=lambda rule: repr(rule).replace("\n", " "))
def test_parameters_are_bit_identical_on_all_ranks_after_every_step(
    three_ranks: RankPool, rule: Aggregator, estimator: Any
) -> None:
    histories = three_ranks.run(
        fit_combination, "many buckets", "SGD", ByzantineDDPStrategy, aggregator=rule, estimator=estimator
    )
    assert histories[0].isfinite().all()
    assert torch.equal(histories[0], histories[1])
    assert torch.equal(histories[0], histories[2])


class FaultyRank(Regression):
    """One rank's loss is not finite from batch 3 to batch 5, or for ever."""

    def __init__(self, ranks: list[int], until: int = 10**9, value: float = torch.nan) -> None:
        super().__init__()
        self.ranks, self.until, self.value = ranks, until, value

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        loss = super().training_step(batch, batch_idx)
        faulty = self.global_rank in self.ranks and 3 <= batch_idx < self.until
        return loss * self.value if faulty else loss


def fit_faulty(ranks: list[int], until: int = 10**9, value: float = torch.nan, **arguments: Any) -> Tensor:
    torch.manual_seed(3)
    return fit(ByzantineDDPStrategy(**arguments), FaultyRank(ranks, until, value))


@pytest.mark.parametrize("faulty", [0, 2])
@pytest.mark.parametrize("value", [torch.nan, torch.inf, 1e30])
def test_a_faulty_rank_is_outvoted(three_ranks: RankPool, faulty: int, value: float) -> None:
    histories = three_ranks.run(fit_faulty, [faulty], value=value)
    assert histories[0].isfinite().all()
    assert all(torch.equal(histories[0], history) for history in histories[1:])
    # It still learns: the parameters go on moving, and not far.
    step = histories[0].diff(dim=0).norm(dim=1)
    assert step[-1] > 0
    assert step[3:].max() < 3 * step[:3].max()


def fit_and_keep_momentum(until: int) -> dict[str, Tensor]:
    torch.manual_seed(3)
    strategy = ByzantineDDPStrategy()
    fit(strategy, FaultyRank([1], until), limit_train_batches=until)
    return strategy.estimator.worker_state()


def test_a_non_finite_gradient_never_enters_the_momentum(three_ranks: RankPool) -> None:
    before, during = (three_ranks.run(fit_and_keep_momentum, until)[1] for until in (3, 6))
    for name, value in before.items():
        assert torch.equal(during[name], value)


def fit_until_breakdown(ranks: list[int]) -> str:
    with pytest.raises(ByzantineBreakdownError) as caught:
        fit_faulty(ranks)
    assert caught.value.workers == ranks
    return str(caught.value)


def test_breakdown_names_the_ranks(three_ranks: RankPool) -> None:
    expected = "2 of 3 workers sent a non-finite or overflowing vector (workers 0, 2), but num_byzantine=1"
    assert three_ranks.run(fit_until_breakdown, [0, 2]) == [expected] * 3


class Overflowing(Regression):
    """Under a loss scale, the gradient of some ranks overflows at batch 3."""

    def __init__(self, ranks: list[int]) -> None:
        super().__init__()
        self.ranks = ranks
        self.scales: list[float] = []

    def on_train_batch_end(self, *_: Any) -> None:
        self.scales.append(self.trainer.precision_plugin.scaler.get_scale())

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        loss = super().training_step(batch, batch_idx)
        return loss * 1e38 if batch_idx == 3 and self.global_rank in self.ranks else loss


def fit_scaled(ranks: list[int], **arguments: Any) -> tuple[Tensor, list[float]]:
    torch.manual_seed(3)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10, growth_interval=4)
    model = Overflowing(ranks)
    plugin = MixedPrecision("16-mixed", "cpu", scaler=scaler)
    # bfloat16 autocast would hide what the scale does; the forward pass stays in float32.
    plugin.autocast_context_manager = nullcontext
    return fit(ByzantineDDPStrategy(**arguments), model, plugins=[plugin]), model.scales


def test_a_gradient_scaler_sees_an_overflow_of_most_ranks(three_ranks: RankPool) -> None:
    results = three_ranks.run(fit_scaled, [0, 1])
    for history, scales in results:
        assert torch.equal(history, results[0][0])
        assert torch.equal(history[3], history[2])  # skipped
        assert not torch.equal(history[4], history[3])
        assert scales[3] == scales[2] / 2
        assert history.isfinite().all()


def test_one_overflowing_rank_is_outvoted_under_a_gradient_scaler(three_ranks: RankPool) -> None:
    for history, scales in three_ranks.run(fit_scaled, [1]):
        assert not torch.equal(history[3], history[2])
        assert scales[3] >= scales[2]


@pytest.mark.parametrize("estimator", ["auto", None])
def test_lengths_are_of_gradients_without_the_loss_scale(three_ranks: RankPool, estimator: Any) -> None:
    options = {"aggregator": CenteredClipping(tau=0.05), "estimator": estimator}
    history, scales = three_ranks.run(fit_scaled, [], **options)[0]
    assert len(set(scales)) > 1
    torch.testing.assert_close(history, three_ranks.run(fit_unscaled, **options)[0], rtol=0, atol=1e-6)


def fit_unscaled(**arguments: Any) -> Tensor:
    torch.manual_seed(3)
    return fit(ByzantineDDPStrategy(**arguments), Regression())


def test_momentum_does_not_see_the_loss_scale(three_ranks: RankPool) -> None:
    history, scales = three_ranks.run(fit_scaled, [], aggregator=Mean())[0]
    assert len(set(scales)) > 1
    stock = three_ranks.run(fit_combination, "plain", "SGD", DDPStrategy)[0]
    torch.testing.assert_close(history, stock, atol=1e-5, rtol=0)


def test_one_worker_takes_a_plain_step(one_rank: RankPool) -> None:
    stock = one_rank.run(fit_combination, "plain", "SGD", DDPStrategy)[0]
    assert torch.equal(one_rank.run(fit_combination, "plain", "SGD", ByzantineDDPStrategy)[0], stock)
    momentum = WorkerMomentum(transparent=False)
    changed = one_rank.run(fit_combination, "plain", "SGD", ByzantineDDPStrategy, estimator=momentum)[0]
    assert torch.equal(changed[0], stock[0])  # v_1 = g_1
    assert not torch.allclose(changed[5], stock[5])


def fit_without_collectives() -> Tensor:
    def refuse(*args: Any, **kwargs: Any) -> None:
        raise AssertionError("a collective")

    with mock.patch("lightning_byzantine.exchange._all_gather", refuse), mock.patch("torch.distributed.gather", refuse):
        return fit_combination("plain", "SGD", ByzantineDDPStrategy)


def test_one_worker_gathers_nothing(one_rank: RankPool) -> None:
    assert one_rank.run(fit_without_collectives)[0].isfinite().all()


class Alternating(TwoOptimizers):
    """Keeps what the momentum of the critic is before and after a step of the other network."""

    def training_step(self, batch: list[Tensor], batch_idx: int) -> None:
        before = self.critic_momentum()
        first, _ = self.optimizers()
        self.toggle_optimizer(first)
        self.manual_backward(self.network(batch[0]).square().mean())
        self.untoggle_optimizer(first)
        self.unchanged = before is None or torch.equal(before, self.critic_momentum())
        first.zero_grad()
        super().training_step(batch, batch_idx)

    def critic_momentum(self) -> Tensor | None:
        momentum = self.trainer.strategy.estimator.worker_state().get("critic.weight")
        return None if momentum is None else momentum.clone()


def fit_alternating() -> bool:
    model = Alternating()
    fit(ByzantineDDPStrategy(find_unused_parameters=True), model)
    return model.unchanged and model.critic_momentum() is not None


def test_a_network_that_is_switched_off_keeps_its_momentum(three_ranks: RankPool) -> None:
    assert three_ranks.run(fit_alternating) == [True, True, True]


def warnings_of_fit() -> list[str]:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        fit(ByzantineDDPStrategy())
    return [str(warning.message) for warning in caught if "outvote" in str(warning.message)]


def test_two_workers_work_with_one_warning(two_ranks: RankPool, three_ranks: RankPool) -> None:
    first, second = two_ranks.run(warnings_of_fit)
    assert len(first) == 1
    assert "f=0 with 2 workers" in first[0]
    assert second == []
    assert three_ranks.run(warnings_of_fit) == [[], [], []]


def fit_validate_test_predict() -> tuple[float, float, int]:
    strategy = ByzantineDDPStrategy()
    model = Regression()
    runner = trainer(strategy)
    runner.fit(model, loader(), loader(2))
    fitted = float(runner.callback_metrics["val_loss"])
    validated = runner.validate(model, loader(2))[0]["val_loss"]
    runner.test(model, loader(2))
    return fitted, validated, len(runner.predict(model, loader(2)))


def test_validates_tests_and_predicts(two_ranks: RankPool) -> None:
    for fitted, validated, batches in two_ranks.run(fit_validate_test_predict):
        assert fitted == pytest.approx(validated)
        assert batches == 2


@pytest.mark.parametrize(
    "argument",
    ["ddp_comm_hook", "ddp_comm_state", "model_averaging_period", "delay_all_reduce_named_params", "process_group"],
)
def test_refuses_what_would_take_gradients_around_the_rule(argument: str) -> None:
    with pytest.raises(MisconfigurationException, match=f"can't take `{argument}`, got {argument}=7"):
        ByzantineDDPStrategy(**{argument: 7})


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"num_byzantine": 4}, ValueError, "num_byzantine must satisfy 0 <= f < m / 2, got f=4 with m=8 workers"),
        ({"num_byzantine": -1}, ValueError, "got f=-1 with m=8"),
        ({"num_byzantine": "2"}, TypeError, "num_byzantine must be an int, got '2'"),
        (
            {"aggregator": MultiKrum(num_selected=7)},
            ValueError,
            "num_selected must be at most m - f, got num_selected=7",
        ),
        ({"aggregator": "Krum"}, TypeError, r"aggregator must be an Aggregator, such as Krum\(\), got 'Krum'"),
        ({"estimator": "momentum"}, TypeError, "estimator must be an Estimator, 'auto' or None, got 'momentum'"),
    ],
)
def test_misuse_is_named_before_any_process_starts(
    arguments: dict[str, Any], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        pl.Trainer(strategy=ByzantineDDPStrategy(**arguments), accelerator="cpu", devices=8, logger=False)


def test_refuses_a_device_that_ddp_does_not_know() -> None:
    strategy = ByzantineDDPStrategy(parallel_devices=[torch.device("meta")] * 3)
    with pytest.raises(MisconfigurationException, match="'cpu' or 'cuda', got a device of type 'meta'"):
        pl.Trainer(strategy=strategy, accelerator="cpu", devices=3, logger=False)


def test_a_breakdown_survives_pickling() -> None:
    error = pickle.loads(pickle.dumps(ByzantineBreakdownError([1, 2], 3, 1)))
    assert (error.workers, error.num_workers, error.num_byzantine) == ([1, 2], 3, 1)
