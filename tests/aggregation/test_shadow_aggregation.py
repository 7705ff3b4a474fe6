import warnings
from copy import deepcopy
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from combinations import fit_combination, fit_scaled, stock_history
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.strategies import DDPStrategy
from pairs import pairwise
from rank_pool import RankPool
from torch import Tensor
from training import Regression, fit, loader, trainer

from lightning_byzantine import ByzantineDDPStrategy
from lightning_byzantine.aggregation.observers import Observers
from lightning_byzantine.aggregation.shadow_aggregation import ShadowAggregation
from lightning_byzantine.aggregators import CTMA, NNM, Aggregator, CenteredClipping, CoordinateWiseMedian
from lightning_byzantine.aggregators.report import Report
from lightning_byzantine.attacks import NonFinite, SignFlip
from lightning_byzantine.callbacks import ByzantineSimulation
from lightning_byzantine.estimators import WorkerMomentum
from lightning_byzantine.matrix import WorkerMatrix
from lightning_byzantine.optim import DoubleMomentumEstimator


@pairwise(
    name=["plain", "many buckets", "manual optimization", "clip by norm"],
    optimizer=["SGD", "Adam"],
    exchange=["all_gather", "all_to_all"],
)
def test_trains_as_stock_ddp(three_ranks: RankPool, name: str, optimizer: str, exchange: str) -> None:
    shadow = three_ranks.run(fit_combination, name, optimizer, ByzantineDDPStrategy, shadow=True, exchange=exchange)
    for history in shadow:
        assert torch.equal(history, shadow[0])
    torch.testing.assert_close(shadow[0], stock_history(three_ranks, name, optimizer), atol=1e-6, rtol=0)


def reports_of_fit(exchange: str, shadow: bool, **arguments: Any) -> list[Report]:
    torch.manual_seed(3)
    strategy = ByzantineDDPStrategy(exchange=exchange, shadow=shadow, **arguments)
    reports: list[Report] = []
    strategy.observe(reports.append)
    fit(strategy, Regression(), callbacks=[ByzantineSimulation(SignFlip(), [1])])
    return reports


def test_reports_what_the_rule_would_have_done(three_ranks: RankPool) -> None:
    gathered, sharded = (three_ranks.run(reports_of_fit, exchange, True) for exchange in ("all_gather", "all_to_all"))
    real = three_ranks.run(reports_of_fit, "all_gather", False)
    # The first step begins at the same parameters, and momentum is proportional to gradients there.
    assert torch.equal(gathered[0][0].trimmed, real[0][0].trimmed)
    torch.testing.assert_close(gathered[0][0].distances, real[0][0].distances)
    for rank in range(3):
        for report, other, own in zip(gathered[0], gathered[rank], sharded[rank], strict=True):
            assert torch.equal(report.distances, other.distances)
            assert torch.equal(report.trimmed, own.trimmed)
            torch.testing.assert_close(report.distances, own.distances, rtol=1e-5, atol=1e-9)


def report_of(
    shadow: ShadowAggregation, observers: Observers, matrix: WorkerMatrix, unused: list[Tensor] | None = None
) -> Report:
    reports: list[Report] = []
    handle = observers.add(reports.append)
    shadow.aggregate(matrix, unused)
    handle.remove()
    return reports[0]


def test_sees_momentum_of_what_could_be_measured() -> None:
    generator = torch.Generator().manual_seed(0)
    observers, rule = Observers(), CTMA(NNM(CoordinateWiseMedian()))
    shadow = ShadowAggregation(CTMA(NNM(CoordinateWiseMedian())), 2, beta=0.9, observers=observers)
    momentum = torch.zeros(5, 30)
    for step in range(6):
        gradients = torch.randn(5, 30, generator=generator)
        if step == 3:
            gradients[4, 7] = torch.nan
        sent = torch.lerp(gradients, momentum, 0.9)
        expected = rule.decide(WorkerMatrix([sent]), 2).report()
        report = report_of(shadow, observers, WorkerMatrix([gradients[:, :10], gradients[:, 10:]]))
        torch.testing.assert_close(report.distances, expected.distances, equal_nan=True)
        assert torch.equal(report.trimmed, expected.trimmed)
        finite = sent.isfinite().all(1)
        momentum[finite] = sent[finite]


@pytest.mark.parametrize("rule", [CTMA(NNM(CoordinateWiseMedian())), CTMA(CenteredClipping(tau=2.0))])
def test_networks_that_take_turns_keep_their_momentum(rule: Aggregator) -> None:
    generator, names = torch.Generator().manual_seed(0), ("first", "second")
    observers, oracle, previous = Observers(), deepcopy(rule), torch.zeros(30)
    shadow = ShadowAggregation(rule, 2, beta=0.9, observers=observers)
    momentum = torch.zeros(5, 30)
    for step in range(6):
        gradients, unused = torch.randn(5, 30, generator=generator), torch.zeros(30, dtype=torch.bool)
        unused[[slice(10), slice(10, 30)][step % 2]] = True
        gradients[:, unused] = 0
        momentum = torch.where(unused, momentum, torch.lerp(gradients, momentum, 0.9))
        sent = WorkerMatrix([momentum.masked_fill(unused, 0)]).with_previous([previous.masked_fill(unused, 0)])
        expected = oracle.decide(sent, 2)
        previous = torch.where(unused, previous, expected.values()[0])
        layout = (tuple(None if unused[10 * index] else name for index, name in enumerate(names)),)
        report = report_of(shadow, observers, WorkerMatrix([gradients], layout=layout), [unused])
        torch.testing.assert_close(report.distances, expected.report().distances)
        assert torch.equal(report.trimmed, expected.report().trimmed)


@pytest.mark.parametrize("beta", [0.0, 0.9])
def test_a_rule_starts_from_what_it_would_have_returned(beta: float) -> None:
    generator = torch.Generator().manual_seed(0)
    observers, rule = Observers(), CTMA(CenteredClipping(tau=2.0))
    shadow = ShadowAggregation(CTMA(CenteredClipping(tau=2.0)), 2, beta, observers)
    momentum = torch.zeros(5, 30)
    for _ in range(4):
        gradients = 3 + torch.randn(5, 30, generator=generator)
        momentum = beta * momentum + (1 - beta) * gradients
        expected = rule.decide(with_previous(rule, momentum), 2)
        report = report_of(shadow, observers, WorkerMatrix([gradients[:, :10], gradients[:, 10:]]))
        torch.testing.assert_close(report.distances, expected.report().distances, rtol=1e-4, atol=1e-6)
        rule.last_aggregate.keep(torch.cat(expected.values()))


def with_previous(rule: Aggregator, rows: Tensor) -> WorkerMatrix:
    return WorkerMatrix([rows]).with_previous(rule.last_aggregate.blocks_for(rows))


def resume_with_quarantine(folder: Path) -> list[str]:
    path = folder / "last.ckpt"
    strategy = ByzantineDDPStrategy()
    robust = trainer(strategy, callbacks=[Quarantining(2)])
    robust.fit(Regression(), loader())
    robust.save_checkpoint(path)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        shadow = trainer(ByzantineDDPStrategy(shadow=True), max_epochs=2)
        shadow.fit(Regression(), loader(), ckpt_path=path)
    assert shadow.global_step == 2 * robust.global_step
    return [str(warning.message) for warning in caught if "quarantine" in str(warning.message)]


class Quarantining(pl.Callback):
    def __init__(self, worker: int) -> None:
        self.worker = worker

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        trainer.strategy.quarantine([self.worker])


def test_resumes_a_run_that_had_a_quarantine(three_ranks: RankPool, tmp_path: Path) -> None:
    first, *_ = three_ranks.run(resume_with_quarantine, tmp_path)
    assert first == ["The checkpoint has workers [2] in quarantine, which shadow mode ignores."]


def fit_with_nan() -> tuple[Tensor, list[list[bool]]]:
    strategy, reports = ByzantineDDPStrategy(shadow=True), []
    strategy.observe(reports.append)
    history = fit(strategy, callbacks=[ByzantineSimulation(NonFinite(), [0, 1])])
    return history, [report.measurable.tolist() for report in reports]


def test_lets_through_what_stock_ddp_lets_through(three_ranks: RankPool) -> None:
    for history, measurable in three_ranks.run(fit_with_nan):
        assert history.isnan().all()
        assert measurable[0] == [False, False, True]


def test_a_gradient_scaler_works_as_with_stock_ddp(three_ranks: RankPool) -> None:
    for history, scales in three_ranks.run(fit_scaled, [1], shadow=True):
        assert torch.equal(history[3], history[2])
        assert scales[3] == scales[2] / 2


@pytest.mark.parametrize("estimator", [WorkerMomentum(transparent=False), None], ids=repr)
def test_no_estimator_changes_the_training(two_ranks: RankPool, estimator: Any) -> None:
    stock = two_ranks.run(fit_combination, "plain", "Adam", DDPStrategy)[0]
    shadow = two_ranks.run(fit_combination, "plain", "Adam", ByzantineDDPStrategy, shadow=True, estimator=estimator)[0]
    torch.testing.assert_close(shadow, stock, atol=1e-6, rtol=0)


def test_refuses_double_momentum() -> None:
    with pytest.raises(MisconfigurationException, match=r"got estimator=DoubleMomentumEstimator\(\)"):
        ByzantineDDPStrategy(shadow=True, estimator=DoubleMomentumEstimator())
