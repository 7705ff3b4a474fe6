"""Double momentum among the rest of Lightning: callbacks, precision, compilation, names."""

import logging
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.callbacks import (
    BackboneFinetuning,
    Callback,
    EarlyStopping,
    EMAWeightAveraging,
    LearningRateMonitor,
    ModelCheckpoint,
    StochasticWeightAveraging,
)
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.plugins.precision import MixedPrecision
from rank_pool import RankPool
from torch import Tensor, nn
from training import Regression, fit, loader, parameters, trainer

from lightning_byzantine import ByzantineDDPStrategy
from lightning_byzantine.aggregators import CTMA, NNM, GeometricMedian, Mean
from lightning_byzantine.estimators import WorkerMomentum
from lightning_byzantine.optim import DoubleMomentum, DoubleMomentumEstimator


class Gentle(Regression):
    """Plain SGD at a learning rate that suits double momentum."""

    def __init__(self, optimizer: str = "SGD", wrapped: dict[str, Any] | None = None, scheduler: bool = False) -> None:
        super().__init__(optimizer)
        self.wrapped, self.scheduler = wrapped, scheduler

    def configure_optimizers(self) -> Any:
        kind = {"SGD": torch.optim.SGD, "Adam": torch.optim.Adam}[self.optimizer]
        optimizer = kind(self.parameters(), lr=0.02)
        if self.wrapped is not None:
            optimizer = DoubleMomentum(optimizer, **self.wrapped)
        if not self.scheduler:
            return optimizer
        return {"optimizer": optimizer, "lr_scheduler": torch.optim.lr_scheduler.StepLR(optimizer, 1, gamma=0.5)}


class Compiled(Gentle):
    def __init__(self) -> None:
        super().__init__()
        self.network = torch.compile(self.network, backend="aot_eager")


def double_momentum(**arguments: Any) -> ByzantineDDPStrategy:
    return ByzantineDDPStrategy(estimator=DoubleMomentumEstimator(), **arguments)


def fit_gentle(strategy: Any = None, **arguments: Any) -> Tensor:
    torch.manual_seed(3)
    strategy = double_momentum() if strategy is None else strategy
    model = arguments.pop("model", Gentle)(**arguments.pop("options", {}))
    return fit(strategy, model, **arguments)


BY_NAME = {"min_beta": 0.05, "min_gamma": 0.05, "weighted": False}


def test_a_name_an_argument_and_a_wrapped_optimizer_are_the_same(three_ranks: RankPool) -> None:
    by_name = three_ranks.run(fit_gentle, "byzantine_ddp_double_momentum")
    by_argument = three_ranks.run(fit_gentle, ByzantineDDPStrategy(estimator=DoubleMomentumEstimator(**BY_NAME)))
    by_hand = three_ranks.run(fit_gentle, "byzantine_ddp", options={"wrapped": BY_NAME})
    both = three_ranks.run(fit_gentle, "byzantine_ddp_double_momentum", options={"wrapped": BY_NAME})
    sharded = three_ranks.run(fit_gentle, "byzantine_ddp_double_momentum_sharded")
    plain = three_ranks.run(fit_gentle, "byzantine_ddp")
    assert not torch.equal(by_name[0], plain[0])
    for histories in (by_name, by_argument, by_hand, both):
        assert all(torch.equal(history, by_name[0]) for history in histories)
    # Sums over the columns are in another order.
    torch.testing.assert_close(sharded[0], by_name[0], rtol=0, atol=1e-5)
    assert all(torch.equal(history, sharded[0]) for history in sharded)


def test_a_wrapped_optimizer_keeps_its_settings(two_ranks: RankPool) -> None:
    by_hand = two_ranks.run(fit_gentle, "byzantine_ddp_double_momentum", options={"wrapped": {}})
    assert torch.equal(by_hand[0], two_ranks.run(fit_gentle)[0])


def test_one_worker_needs_no_other(one_rank: RankPool) -> None:
    history = one_rank.run(fit_gentle)[0]
    assert not torch.equal(history, one_rank.run(fit_gentle, "byzantine_ddp")[0])
    assert one_rank.run(fit_gentle, options={"optimizer": "Adam"})[0].isfinite().all()


@pytest.mark.slow
def test_compiled_networks_train_alike(two_ranks: RankPool) -> None:
    compiled, plain = two_ranks.run(fit_gentle, model=Compiled)[0], two_ranks.run(fit_gentle)[0]
    torch.testing.assert_close(compiled, plain, atol=1e-5, rtol=0)


class Messages(logging.Handler):
    def __init__(self) -> None:
        super().__init__()
        self.texts: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.texts.append(record.getMessage())


def messages_of_fit(wrapped: dict[str, Any] | None) -> list[str]:
    handler = Messages()
    logging.getLogger("lightning.pytorch.utilities.rank_zero").addHandler(handler)
    fit_gentle(options={"wrapped": wrapped})
    logging.getLogger("lightning.pytorch.utilities.rank_zero").removeHandler(handler)
    return [text for text in handler.texts if "DoubleMomentum" in text]


def test_one_sentence_says_what_was_wrapped(two_ranks: RankPool) -> None:
    sentence = "Wrapped SGD in DoubleMomentum, for DoubleMomentumEstimator()."
    assert two_ranks.run(messages_of_fit, None) == [[sentence], []]
    assert two_ranks.run(messages_of_fit, {}) == [[], []]
    kept = "Kept the optimizer's own DoubleMomentumEstimator(beta=0.5) instead of the strategy's"
    assert two_ranks.run(messages_of_fit, {"beta": 0.5})[0] == [f"{kept} DoubleMomentumEstimator()."]


def fit_with(callbacks: list[Callback]) -> tuple[Tensor, dict[str, float], int]:
    """Return the parameters, the logged metrics, and the number of epochs."""
    torch.manual_seed(3)
    model = Gentle()
    runner = trainer(double_momentum(), callbacks=callbacks, max_epochs=4, enable_checkpointing=True)
    runner.fit(model, loader(4), loader(2))
    metrics = {name: float(value) for name, value in runner.callback_metrics.items()}
    return parameters(model), metrics, runner.current_epoch


def test_early_stopping_and_model_checkpoint(two_ranks: RankPool, tmp_path: Path) -> None:
    callbacks = [
        EarlyStopping("val_loss", min_delta=1e9, patience=1),
        ModelCheckpoint(tmp_path, monitor="val_loss", filename="best"),
    ]
    for weights, metrics, epoch in two_ranks.run(fit_with, callbacks):
        assert epoch == 2
        assert metrics.keys() >= {"loss", "val_loss"}
        assert weights.isfinite().all()
    checkpoint = torch.load(tmp_path / "best.ckpt", weights_only=True)
    model = Gentle()
    model.load_state_dict(checkpoint["state_dict"])
    assert checkpoint["optimizer_states"][0]["double_momentum"]["step"] > 1


def fit_averaged(kind: str) -> tuple[Tensor, Tensor]:
    torch.manual_seed(3)
    model = Gentle()
    callbacks = {
        "not at all": lambda: [],
        "exponential": lambda: [EMAWeightAveraging(decay=0.5)],
        "stochastic": lambda: [StochasticWeightAveraging(swa_lrs=0.01, swa_epoch_start=2)],
    }[kind]()
    return fit(double_momentum(), model, callbacks=callbacks, max_epochs=4), parameters(model)


@pytest.mark.slow
def test_exponential_moving_average(two_ranks: RankPool) -> None:
    history, _ = two_ranks.run(fit_averaged, "not at all")[0]
    averaged, last = two_ranks.run(fit_averaged, "exponential")[0]
    assert torch.equal(averaged, history)
    expected = history[0]
    for point in history[1:]:
        expected = 0.5 * expected + 0.5 * point
    torch.testing.assert_close(last, expected, atol=1e-5, rtol=0)


@pytest.mark.slow
def test_stochastic_weight_averaging(two_ranks: RankPool) -> None:
    history, _ = two_ranks.run(fit_averaged, "not at all")[0]
    results = two_ranks.run(fit_averaged, "stochastic")
    for averaged, last in results:
        assert torch.equal(averaged[:10], history[:10])
        assert last.isfinite().all() and torch.equal(last, results[0][1])


class OneHeadATime(Gentle):
    """Two heads that take turns: a parameter without a gradient stays where it is, and so does its previous point."""

    def __init__(self) -> None:
        super().__init__()
        self.heads = nn.ModuleList([nn.Linear(8, 1), nn.Linear(8, 1)])

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        return nn.functional.mse_loss(self.heads[batch_idx % 2](batch[0]) + self.network(batch[0]), batch[1])

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        optimizer = self.trainer.optimizers[0]
        with optimizer.swapped_to_previous_point():
            previous = parameters(self)
        if batch_idx > 0:
            assert torch.equal(previous, self.last)
        self.last = parameters(self)


def fit_heads() -> bool:
    torch.manual_seed(3)
    return bool(fit(double_momentum(find_unused_parameters=True), OneHeadATime(), 8).isfinite().all())


def test_the_previous_point_is_that_of_all_parameters(two_ranks: RankPool) -> None:
    assert two_ranks.run(fit_heads) == [True, True]


class NormalisedAveraging(Gentle):
    """With batch normalisation, so that Stochastic Weight Averaging has an epoch without backward."""

    def __init__(self) -> None:
        super().__init__()
        self.network = nn.Sequential(nn.Linear(8, 16), nn.BatchNorm1d(16), nn.Tanh(), nn.Linear(16, 1))
        self.steps: list[int] = []

    def on_train_epoch_end(self) -> None:
        self.steps.append(self.trainer.strategy.estimator.step)


def fit_normalised() -> tuple[list[int], Tensor]:
    torch.manual_seed(3)
    model = NormalisedAveraging()
    callback = StochasticWeightAveraging(swa_lrs=0.01, swa_epoch_start=1)
    fit(double_momentum(), model, 5, callbacks=[callback], max_epochs=3)
    return model.steps, parameters(model)


def test_an_epoch_without_backward_takes_no_steps(two_ranks: RankPool) -> None:
    for steps, last in two_ranks.run(fit_normalised):
        assert steps[2] == 16
        assert len(steps) == 4 and steps[3] == 16
        assert last.isfinite().all()


def learning_rates(wrapped: dict[str, Any] | None, scheduler: bool, folder: Path) -> set[str]:
    monitor = LearningRateMonitor()
    runner = trainer(
        double_momentum(), callbacks=[monitor], max_epochs=2, logger=CSVLogger(folder), log_every_n_steps=1
    )
    runner.fit(Gentle(wrapped=wrapped, scheduler=scheduler), loader(2))
    assert monitor.lrs
    return set(monitor.lrs)


@pytest.mark.parametrize("scheduler", [False, True])
def test_learning_rates_are_logged_once(two_ranks: RankPool, tmp_path: Path, scheduler: bool) -> None:
    assert two_ranks.run(learning_rates, None, scheduler, tmp_path)[0] == {"lr-SGD"}
    assert two_ranks.run(learning_rates, {}, scheduler, tmp_path)[0] == {"lr-DoubleMomentum"}


class WithBackbone(Regression):
    def __init__(self) -> None:
        super().__init__()
        self.backbone, self.head = nn.Linear(8, 8), nn.Linear(8, 1)
        del self.network

    def forward(self, inputs: Tensor) -> Tensor:
        return self.head(torch.tanh(self.backbone(inputs)))

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD([p for p in self.parameters() if p.requires_grad], lr=0.02)


class FreezesOnTrainStart(Callback):
    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        pl_module.backbone.requires_grad_(False)

    def on_train_epoch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if trainer.current_epoch == 1:
            pl_module.backbone.requires_grad_(True)
            trainer.optimizers[0].add_param_group({"params": pl_module.backbone.parameters(), "lr": 0.01})


def fit_backbone() -> Tensor:
    torch.manual_seed(3)
    strategy = double_momentum(find_unused_parameters=True)
    model = WithBackbone()
    model.configure_optimizers = lambda: torch.optim.SGD(model.head.parameters(), lr=0.02)
    return fit(strategy, model, 4, max_epochs=2, callbacks=[FreezesOnTrainStart()])


def test_parameters_may_join_later(two_ranks: RankPool) -> None:
    history, other = two_ranks.run(fit_backbone)
    assert torch.equal(history, other)
    backbone = history[:, :72]
    assert torch.equal(backbone[0], backbone[3])
    assert not torch.equal(backbone[3], backbone[7])


def fit_unknown() -> str:
    callback = BackboneFinetuning(unfreeze_backbone_at_epoch=1)
    with pytest.raises(MisconfigurationException) as caught:
        fit(ByzantineDDPStrategy(), WithBackbone(), 4, max_epochs=2, callbacks=[callback])
    return str(caught.value)


def test_refuses_parameters_that_ddp_does_not_know(two_ranks: RankPool) -> None:
    for said in two_ranks.run(fit_unknown):
        assert "'backbone.weight' was frozen when DDP was set up" in said


class OverflowingOnce(Gentle):
    """Makes its batches from their number; on some ranks, the loss of batch 3 overflows."""

    def __init__(self, ranks: list[int], batches: list[int]) -> None:
        super().__init__()
        self.ranks, self.batches = ranks, batches
        self.scales: list[float] = []

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        number = self.batches[batch_idx]
        generator = torch.Generator().manual_seed(100 * number + self.global_rank)
        inputs = torch.randn(4, 8, generator=generator)
        loss = nn.functional.mse_loss(self.network(inputs), inputs.sum(1, keepdim=True))
        return loss * 1e38 if number == 3 and self.global_rank in self.ranks else loss


class SkippingOne(OverflowingOnce):
    """Evaluates batch 3, but does not step."""

    def optimizer_step(self, epoch: int, batch_idx: int, optimizer: Any, optimizer_closure: Any) -> None:
        if self.batches[batch_idx] == 3:
            optimizer_closure()
        else:
            optimizer.step(closure=optimizer_closure)


def fit_skipping(batches: list[int]) -> tuple[Tensor, dict[str, Tensor]]:
    torch.manual_seed(3)
    # A rule without memory: it is the optimizer's step that is skipped, not the aggregation.
    strategy = double_momentum(aggregator=CTMA(NNM(GeometricMedian())))
    history = fit(strategy, SkippingOne([], batches), len(batches))
    return history[-1], strategy.estimator.worker_state() | strategy.estimator.shared_state()


def test_a_step_that_the_module_skips_leaves_no_trace(three_ranks: RankPool) -> None:
    skipping = three_ranks.run(fit_skipping, list(range(6)))
    for (last, state), (expected, expected_state) in zip(
        skipping, three_ranks.run(fit_skipping, [0, 1, 2, 4, 5]), strict=True
    ):
        assert torch.equal(last, expected)
        assert all(torch.equal(state[name], value) for name, value in expected_state.items())


def fit_scaled(
    ranks: list[int], batches: list[int], scaled: bool = True, **arguments: Any
) -> tuple[Tensor, int, dict[str, Tensor]]:
    torch.manual_seed(3)
    plugins = []
    if scaled:
        scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10, growth_interval=4)
        plugins = [MixedPrecision("16-mixed", "cpu", scaler=scaler)]
        # bfloat16 autocast would hide what the scale does; the forward pass stays in float32.
        plugins[0].autocast_context_manager = nullcontext
    strategy = double_momentum(**arguments)
    history = fit(strategy, OverflowingOnce(ranks, batches), len(batches), plugins=plugins)
    return history, strategy.estimator.step, strategy.estimator.worker_state()


def test_an_overflow_is_skipped_on_all_ranks_as_if_the_batch_had_not_been(three_ranks: RankPool) -> None:
    kept = [0, 1, 2, 4, 5, 6, 7]
    expected = three_ranks.run(fit_scaled, [], kept, scaled=False)
    for (history, step, state), (steps, clean_step, clean_state) in zip(
        three_ranks.run(fit_scaled, [0, 1], list(range(8))), expected, strict=True
    ):
        assert torch.equal(history[3], history[2])
        assert step == clean_step == 8
        torch.testing.assert_close(history[[0, 1, 2, 4, 5, 6, 7]], steps, atol=1e-5, rtol=0)
        torch.testing.assert_close(state, clean_state, atol=1e-5, rtol=0)


def test_one_overflowing_rank_is_outvoted_and_keeps_its_estimate(three_ranks: RankPool) -> None:
    results = three_ranks.run(fit_scaled, [1], list(range(4)))
    before = three_ranks.run(fit_scaled, [1], list(range(3)))
    for history, step, _ in results:
        assert step == 5
        assert torch.equal(history, results[0][0])
        assert not torch.equal(history[3], history[2])
    assert all(torch.equal(results[1][2][name], value) for name, value in before[1][2].items())
    assert not any(torch.equal(results[0][2][name], value) for name, value in before[0][2].items())


def test_with_the_mean_one_overflow_is_skipped_on_all_ranks(three_ranks: RankPool) -> None:
    results = three_ranks.run(fit_scaled, [2], list(range(8)), aggregator=Mean(), num_byzantine=0)
    for history, step, _ in results:
        assert torch.equal(history, results[0][0])
        assert torch.equal(history[3], history[2])
        assert step == 8


def fit_bfloat16() -> Tensor:
    strategy = ByzantineDDPStrategy(estimator=DoubleMomentumEstimator(min_beta=0.05))
    return fit_gentle(strategy, precision="bf16-mixed")


def test_bfloat16_mixed(two_ranks: RankPool) -> None:
    first, second = two_ranks.run(fit_bfloat16)
    assert torch.equal(first, second)
    torch.testing.assert_close(first, two_ranks.run(fit_gentle)[0], atol=0.1, rtol=0)


def clipped_by_workers(max_worker_grad_norm: float | None, estimator: Any) -> Tensor:
    strategy = ByzantineDDPStrategy(Mean(), 0, estimator=estimator, max_worker_grad_norm=max_worker_grad_norm)
    return fit_gentle(strategy)


@pytest.mark.parametrize("estimator", [None, WorkerMomentum(0.5), DoubleMomentumEstimator()], ids=repr)
def test_worker_gradients_are_clipped_under_any_estimator(two_ranks: RankPool, estimator: Any) -> None:
    free = two_ranks.run(clipped_by_workers, None, estimator)[0]
    assert torch.equal(two_ranks.run(clipped_by_workers, 1e6, estimator)[0], free)
    first, second = two_ranks.run(clipped_by_workers, 1e-3, estimator)
    assert torch.equal(first, second)
    # With the mean, a step is no longer than the longest of the workers'.
    assert (first[1] - first[0]).norm() < 3 * 0.02 * 1e-3
    assert (free[1] - free[0]).norm() > 0.02 * 1e-3


@pytest.mark.parametrize(("value", "error"), [(0, ValueError), (-1.0, ValueError), ("two", TypeError)])
def test_refuses_a_norm(value: Any, error: type[Exception]) -> None:
    with pytest.raises(error, match=f"max_worker_grad_norm must be .*, got '?{value}"):
        ByzantineDDPStrategy(max_worker_grad_norm=value)


def fit_then_go_on_alone() -> bool:
    torch.manual_seed(3)
    model = Gentle(wrapped={})
    optimizer = model.configure_optimizers()
    model.configure_optimizers = lambda: optimizer
    fit("byzantine_ddp", model, 4)
    before = parameters(model)

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = model(torch.ones(1, 8)).square().mean()
        loss.backward()
        return loss

    losses = [float(optimizer.step(closure)) for _ in range(3)]
    return losses[-1] < losses[0] and not torch.equal(parameters(model), before)


def test_a_wrapped_optimizer_goes_on_alone_after_fit(two_ranks: RankPool) -> None:
    assert two_ranks.run(fit_then_go_on_alone) == [True, True]


def refit() -> list[str]:
    """One strategy, first with a wrapped optimizer, then with one that is not."""
    strategy = ByzantineDDPStrategy()
    kinds = []
    runner = trainer(strategy)
    for wrapped in (None, {}, None):
        runner.fit(Gentle(wrapped=wrapped), loader(2))
        runner.fit_loop.epoch_progress.reset()
        kinds.append(type(strategy.estimator).__name__)
    return kinds


def test_every_fit_finds_its_own_estimator(two_ranks: RankPool) -> None:
    for kinds in two_ranks.run(refit):
        assert kinds == ["WorkerMomentum", "DoubleMomentumEstimator", "WorkerMomentum"]
