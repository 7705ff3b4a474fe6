"""Every two options of the strategy meet, in all their values, in some short run, with and without faults."""

import warnings
from functools import cache
from typing import Any

import pytest
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.strategies import DDPStrategy
from pairs import covering
from rank_pool import RankPool
from torch import Tensor, nn
from training import ParametersOfEveryStep, Regression, loader, trainer

from lightning_byzantine import ByzantineBreakdownError, ByzantineDDPStrategy
from lightning_byzantine.aggregators import CTMA, Bucketing, CenteredClipping, CoordinateWiseMedian, Krum, Mean
from lightning_byzantine.estimators import WorkerMomentum
from lightning_byzantine.optim import DoubleMomentumEstimator

AGGREGATORS = {
    "Mean": Mean(),
    "default": None,
    "Krum": Krum(),
    "random": CTMA(Bucketing(CoordinateWiseMedian())),
    "from the last": CenteredClipping(tau=0.5),
}
ESTIMATORS = {
    "auto": "auto",
    "none": None,
    "paper's momentum": WorkerMomentum(transparent=False),
    "double": DoubleMomentumEstimator(),
}
OPTIONS: dict[str, list[Any]] = {
    "aggregator": list(AGGREGATORS),
    "estimator": list(ESTIMATORS),
    "exchange": ["all_gather", "all_to_all"],
    "shadow": [False, True],
    "workers_per_process": [1, 2],
    "max_worker_grad_norm": [None, 0.5],
    "on_breakdown": ["raise", "skip", "propagate"],
    "robust_buffers": [True, False],
    "robust_metrics": [False, True],
    "check_consistency_every_n_steps": [0, 2],
    "on_worker_error": ["raise", "exclude"],
    "find_unused_parameters": [False, True],
    "gradient_as_bucket_view": [False, True],
    # of a worker: the Trainer's is workers_per_process times as many
    "accumulate_grad_batches": [1, 2],
    "precision": ["32-true", "64-true", "bf16-mixed"],
    # in the second of four steps: one rank's loss or two ranks' is not a number, or one rank's training step raises
    "fault": ["none", "one rank", "two ranks", "error"],
}
STEPS = 4
Row = dict[str, Any]


def goes_together(row: Row) -> bool:
    if row.get("shadow") and row.get("estimator") == "double":
        return False
    # An error that is not excluded ends the run.
    return row.get("fault") != "error" or row.get("on_worker_error") != "raise"


PLAIN: Row = {name: values[0] for name, values in OPTIONS.items()}
ROWS = covering(OPTIONS, is_allowed=goes_together)
# Breakdowns need more than two: where the run is one of stock DDP, there are none.
ROWS += [PLAIN | {"on_breakdown": policy, "fault": "two ranks"} for policy in OPTIONS["on_breakdown"]]


class Faulty(Regression):
    """Has buffers, a layer that some ranks leave unused now and then, and faults."""

    def __init__(self, window: int, unused: bool, fault: str) -> None:
        super().__init__()
        self.window, self.unused, self.fault = window, unused, fault
        self.network = nn.Sequential(nn.Linear(8, 16), nn.BatchNorm1d(16), nn.Tanh(), nn.Linear(16, 1))
        self.not_on_rank_1 = nn.Linear(8, 1)

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        inputs, targets = batch
        outputs = self.network(inputs)
        if not self.unused or self.global_rank != 1 or batch_idx % 2:
            outputs = outputs + self.not_on_rank_1(inputs)
        loss = nn.functional.mse_loss(outputs, targets)
        if batch_idx // self.window == 1:
            if self.fault == "error" and self.global_rank == 0:
                raise IndexError("no such row")
            if self.global_rank in {"one rank": (2,), "two ranks": (0, 2)}.get(self.fault, ()):
                loss = loss * torch.nan
        return loss

    def validation_step(self, batch: list[Tensor], batch_idx: int) -> None:
        self.log("val_loss", nn.functional.mse_loss(self.network(batch[0]), batch[1]), sync_dist=True)


def fit_row(row: Row, stock: bool = False) -> tuple[Tensor | None, float, list[int]]:
    """Return the parameters after each step and the last validation loss; or else, who broke down."""
    options = dict(row)
    fault, precision = options.pop("fault"), options.pop("precision")
    window = options.pop("accumulate_grad_batches") * options["workers_per_process"]
    options["aggregator"], options["estimator"] = AGGREGATORS[row["aggregator"]], ESTIMATORS[row["estimator"]]
    torch.manual_seed(3)
    model, history = Faulty(window, options["find_unused_parameters"], fault), ParametersOfEveryStep()
    if stock:
        options = {"find_unused_parameters": options["find_unused_parameters"]}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        strategy = (DDPStrategy if stock else ByzantineDDPStrategy)(**options)
        runner = trainer(strategy, callbacks=[history], precision=precision, accumulate_grad_batches=window)
        try:
            runner.fit(model, loader(STEPS * window), loader(1))
        except ByzantineBreakdownError as error:
            return None, 0.0, error.workers
    return torch.stack(history.history)[window - 1 :: window], float(runner.callback_metrics["val_loss"]), []


@cache
def stock_history(ranks: RankPool, *items: tuple[str, Any]) -> Tensor:
    return ranks.run(fit_row, PLAIN | dict(items), stock=True)[0][0]


@pytest.mark.parametrize("row", ROWS, ids=lambda row: "-".join(map(str, row.values())))
def test_ranks_stay_alike_and_faults_have_the_end_that_was_asked_for(three_ranks: RankPool, row: Row) -> None:
    results = three_ranks.run(fit_row, row)
    history, val_loss, broken = results[0]
    is_breakdown = row["fault"] == "two ranks" and not row["shadow"]
    if is_breakdown and row["on_breakdown"] == "raise":
        of_ranks = [0, 2] if row["workers_per_process"] == 1 else [0, 1, 4, 5]
        assert [workers for _, _, workers in results] == [of_ranks] * 3
        return
    assert broken == []
    assert history is not None and len(history) == STEPS
    for other, other_loss, _ in results[1:]:
        torch.testing.assert_close(other, history, rtol=0, atol=0, equal_nan=True)
        assert other_loss == pytest.approx(val_loss, rel=0, abs=0, nan_ok=True)
    if (row["shadow"] and row["fault"] != "none") or (is_breakdown and row["on_breakdown"] == "propagate"):
        assert history[0].isfinite().all()
        assert history[1].isnan().any()
        return
    assert history.isfinite().all()
    if is_breakdown:
        assert torch.equal(history[1], history[0])  # skipped
    if trains_as_stock_ddp(row):
        names = ("find_unused_parameters", "workers_per_process", "accumulate_grad_batches", "precision")
        stock = stock_history(three_ranks, *((name, row[name]) for name in names))
        tolerance = 1e-6 if row["shadow"] or row["estimator"] == "none" else 1e-5
        torch.testing.assert_close(history, stock, rtol=0, atol=tolerance)


def trains_as_stock_ddp(row: Row) -> bool:
    is_mean = row["shadow"] or (row["aggregator"] == "Mean" and row["estimator"] in ("auto", "none"))
    return is_mean and row["fault"] == "none" and row["max_worker_grad_norm"] is None


def test_the_table_has_runs_of_every_kind() -> None:
    assert len(ROWS) <= 30
    assert sum(map(trains_as_stock_ddp, ROWS)) >= 2
    ends = {row["on_breakdown"] for row in ROWS if row["fault"] == "two ranks" and not row["shadow"]}
    assert ends == {"raise", "skip", "propagate"}


def test_shadow_and_double_momentum_do_not_go_together() -> None:
    with pytest.raises(MisconfigurationException, match="With shadow=True the run is one of stock DDP"):
        ByzantineDDPStrategy(shadow=True, estimator=DoubleMomentumEstimator())
