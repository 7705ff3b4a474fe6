import pickle
import warnings
from typing import Any
from unittest import mock

import lightning.pytorch as pl
import pytest
import torch
from combinations import (
    COMBINATIONS,
    RULES,
    FaultyRank,
    TwoOptimizers,
    fit_combination,
    fit_faulty,
    fit_scaled,
    stock_history,
)
from lightning.fabric.utilities.exceptions import MisconfigurationException
from pairs import pairwise
from rank_pool import RankPool
from torch import Tensor
from training import Regression, fit, loader, trainer

from lightning_byzantine import ByzantineBreakdownError, ByzantineDDPStrategy
from lightning_byzantine.aggregators import (
    Aggregator,
    CenteredClipping,
    Mean,
    MultiKrum,
)
from lightning_byzantine.estimators import WorkerMomentum

ESTIMATORS: dict[str, Any] = {
    "auto": "auto",
    "paper's momentum": WorkerMomentum(transparent=False),
    "none": None,
}


@pairwise(
    name=list(COMBINATIONS), optimizer=["SGD", "Adam"], estimator=["none", "auto"], ranks=[2, 3], indirect=["ranks"]
)
def test_trains_like_stock_ddp_with_the_mean(ranks: RankPool, name: str, optimizer: str, estimator: str) -> None:
    stock = stock_history(ranks, name, optimizer)
    first, *others = ranks.run(
        fit_combination, name, optimizer, ByzantineDDPStrategy, aggregator=Mean(), estimator=ESTIMATORS[estimator]
    )
    assert all(torch.equal(first, other) for other in others)
    assert not torch.equal(stock[0], stock[-1])
    tolerance = 1e-6 if estimator == "none" else {"SGD": 1e-5, "Adam": 1e-4}[optimizer]
    torch.testing.assert_close(first, stock, atol=tolerance, rtol=0)


# All rules with the default, all estimators with a rule that has other rules in it.
RULES_AND_ESTIMATORS = [
    pytest.param(rule, name, marks=() if name == "auto" or rule is RULES[-1] else pytest.mark.slow)
    for rule in RULES
    for name in ESTIMATORS
]


@pytest.mark.parametrize(("rule", "estimator"), RULES_AND_ESTIMATORS, ids=lambda value: " ".join(str(value).split()))
def test_parameters_are_bit_identical_on_all_ranks_after_every_step(
    three_ranks: RankPool, rule: Aggregator, estimator: str
) -> None:
    first, *others = three_ranks.run(
        fit_combination, "many buckets", "SGD", ByzantineDDPStrategy, aggregator=rule, estimator=ESTIMATORS[estimator]
    )
    assert first.isfinite().all()
    assert all(torch.equal(first, other) for other in others)


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
    stock = stock_history(three_ranks, "plain", "SGD")
    torch.testing.assert_close(history, stock, atol=1e-5, rtol=0)


def test_one_worker_takes_a_plain_step(one_rank: RankPool) -> None:
    stock = stock_history(one_rank, "plain", "SGD")
    assert torch.equal(one_rank.run(fit_combination, "plain", "SGD", ByzantineDDPStrategy)[0], stock)
    momentum = WorkerMomentum(transparent=False)
    changed = one_rank.run(fit_combination, "plain", "SGD", ByzantineDDPStrategy, estimator=momentum)[0]
    assert torch.equal(changed[0], stock[0])  # v_1 = g_1
    assert not torch.allclose(changed[5], stock[5])


def fit_without_collectives() -> Tensor:
    def refuse(*args: Any, **kwargs: Any) -> None:
        raise AssertionError("a collective")

    with (
        mock.patch("lightning_byzantine.exchange.collectives._all_gather", refuse),
        mock.patch("torch.distributed.gather", refuse),
    ):
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
