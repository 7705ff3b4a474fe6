import tempfile
import warnings
from copy import deepcopy
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from combinations import FaultyRank, TwoOptimizers, fit_scaled
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.strategies import DDPStrategy
from rank_pool import RankPool
from torch import Tensor, nn
from training import Regression, fit

from lightning_byzantine import ByzantineBreakdownError, ByzantineDDPStrategy
from lightning_byzantine.aggregators import Aggregator, MoNNA
from lightning_byzantine.attacks import NonFinite
from lightning_byzantine.callbacks import ByzantineSimulation
from lightning_byzantine.optim import DoubleMomentumEstimator


class StatesOfEveryStep(pl.Callback):
    """Keeps the optimizers' states after every batch."""

    def __init__(self) -> None:
        self.states: list[Any] = []

    def on_train_batch_end(self, trainer: pl.Trainer, *_: Any) -> None:
        self.states.append(deepcopy([optimizer.state_dict()["state"] for optimizer in trainer.optimizers]))


class Decaying(FaultyRank):
    """AdamW, whose weight decay and state move even where gradients are zero."""

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), lr=1e-2, weight_decay=0.1)


def flat(state: Any) -> list[Tensor]:
    if isinstance(state, Tensor):
        return [state]
    values = state.values() if isinstance(state, dict) else state if isinstance(state, list) else []
    return [tensor for value in values for tensor in flat(value)]


def fit_skipping(
    model: type[FaultyRank] = Decaying, ranks: tuple[int, ...] = (0, 2), until: int = 6, **arguments: Any
) -> tuple[Tensor, list[list[Tensor]], int]:
    torch.manual_seed(3)
    states = StatesOfEveryStep()
    trainer_arguments = arguments.pop("trainer", {})
    strategy = ByzantineDDPStrategy(on_breakdown="skip", **arguments)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        history = fit(strategy, model(list(ranks), until), callbacks=[states], **trainer_arguments)
    return history, [flat(state) for state in states.states], strategy.skipped_steps


@pytest.mark.parametrize("exchange", ["all_gather", "all_to_all"])
@pytest.mark.parametrize("estimator", ["auto", DoubleMomentumEstimator(beta=0.2)], ids=repr)
def test_a_skipped_step_moves_neither_parameters_nor_optimizer(
    three_ranks: RankPool, estimator: Any, exchange: str
) -> None:
    results = three_ranks.run(fit_skipping, estimator=estimator, exchange=exchange)
    for history, states, skipped in results:
        assert skipped == 3
        assert torch.equal(history, results[0][0])
        assert history.isfinite().all()
        for step in (3, 4, 5):
            assert torch.equal(history[step], history[2])
            assert all(torch.equal(now, before) for now, before in zip(states[step], states[2], strict=True))
        assert not torch.equal(history[6], history[5])


def fit_until_max_skips(**arguments: Any) -> tuple[list[int], int]:
    strategy = ByzantineDDPStrategy(on_breakdown="skip", max_skips=4)
    with warnings.catch_warnings(), pytest.raises(ByzantineBreakdownError) as caught:
        warnings.simplefilter("ignore")
        fit(strategy, FaultyRank([1, 2]))
    return caught.value.workers, strategy.skipped_steps


def test_raises_after_max_skips_in_a_row(three_ranks: RankPool) -> None:
    assert three_ranks.run(fit_until_max_skips) == [([1, 2], 4)] * 3


class EveryOther(FaultyRank):
    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        loss = Regression.training_step(self, batch, batch_idx)
        return loss * torch.nan if batch_idx % 2 == 1 and self.global_rank in self.ranks else loss


def test_skips_that_are_not_in_a_row_end_nothing(three_ranks: RankPool) -> None:
    for history, _, skipped in three_ranks.run(fit_skipping, EveryOther, max_skips=1):
        assert skipped == 5
        assert history.isfinite().all()


class FaultyTwoOptimizers(TwoOptimizers):
    """Both networks' losses are not finite on two ranks in batch 3."""

    def __init__(self, optimizer: str = "Adam") -> None:
        super().__init__(optimizer)

    def manual_backward(self, loss: Tensor, *args: Any, **kwargs: Any) -> None:
        faulty = self.global_rank in (0, 1) and self.batch == 3
        super().manual_backward(loss * torch.nan if faulty else loss, *args, **kwargs)

    def training_step(self, batch: list[Tensor], batch_idx: int) -> None:
        self.batch = batch_idx
        super().training_step(batch, batch_idx)


def fit_manually() -> tuple[Tensor, list[list[Tensor]]]:
    torch.manual_seed(3)
    states = StatesOfEveryStep()
    strategy = ByzantineDDPStrategy(on_breakdown="skip", find_unused_parameters=True)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        history = fit(strategy, FaultyTwoOptimizers(), callbacks=[states])
    return history, [flat(state) for state in states.states]


def test_skips_in_manual_optimization(three_ranks: RankPool) -> None:
    for history, states in three_ranks.run(fit_manually):
        assert history.isfinite().all()
        assert torch.equal(history[3], history[2])
        assert all(torch.equal(now, before) for now, before in zip(states[3], states[2], strict=True))
        assert not torch.equal(history[4], history[3])


def fit_logged(folder: Path) -> None:
    logger = CSVLogger(folder, name="", version="")
    fit_skipping(trainer={"logger": logger, "log_every_n_steps": 1})


def test_skips_are_logged(three_ranks: RankPool, tmp_path: Path) -> None:
    three_ranks.run(fit_logged, tmp_path)
    header, *rows = (tmp_path / "metrics.csv").read_text().splitlines()
    column = header.split(",").index("byzantine/skipped_steps")
    assert [row.split(",")[column] for row in rows if row.split(",")[column]] == ["1", "2", "3"]


def fit_propagating(strategy: type[DDPStrategy], ranks: list[int], **arguments: Any) -> Tensor:
    torch.manual_seed(3)
    return fit(strategy(**arguments), FaultyRank(ranks))


def test_propagates_as_stock_ddp(three_ranks: RankPool) -> None:
    stock = three_ranks.run(fit_propagating, DDPStrategy, [0, 2])
    own = three_ranks.run(fit_propagating, ByzantineDDPStrategy, [0, 2], on_breakdown="propagate")
    assert torch.equal(own[0].isnan(), stock[0].isnan()) and own[0][3].isnan().all()
    # One bad worker is still outvoted.
    assert three_ranks.run(fit_propagating, ByzantineDDPStrategy, [2], on_breakdown="propagate")[0].isfinite().all()


@pytest.mark.parametrize("policy", ["raise", "skip", "propagate"])
def test_a_gradient_scaler_goes_first(three_ranks: RankPool, policy: str) -> None:
    results = three_ranks.run(fit_scaled, [0, 1], on_breakdown=policy)
    for history, scales in results:
        assert torch.equal(history[3], history[2])
        assert scales[3] == scales[2] / 2
        assert history.isfinite().all()


def test_misuse_is_named() -> None:
    with pytest.raises(ValueError, match="on_breakdown must be one of raise, skip, propagate, got 'ignore'"):
        ByzantineDDPStrategy(on_breakdown="ignore")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="max_skips must be at least 1, got 0"):
        ByzantineDDPStrategy(max_skips=0)


FAULTS = {"nan": torch.nan, "inf": torch.inf, "zero": 0.0, "huge": 1e30, "flipped": -1.0, "none": 1.0}


class Fuzzed(Regression):
    """Some ranks' losses are multiplied by something, step by step; some are put in quarantine."""

    def __init__(self, plan: list[dict[int, str]], quarantine: dict[int, int]) -> None:
        super().__init__()
        self.plan = plan
        self.quarantine = quarantine

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        if batch_idx in self.quarantine:
            self.trainer.strategy.quarantine([self.quarantine[batch_idx]])
        loss = super().training_step(batch, batch_idx)
        return loss * FAULTS[self.plan[batch_idx].get(self.global_rank, "none")]


def fit_fuzzed(
    folder: Path, plan: list[dict[int, str]], quarantine: dict[int, int], stop: int
) -> list[tuple[Tensor, frozenset[int]]]:
    """Train, and once more from a checkpoint amid it."""
    torch.manual_seed(3)
    save = ModelCheckpoint(folder, filename="{step}", every_n_train_steps=stop, save_top_k=-1)
    results = []
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for arguments in (
            {"callbacks": [save], "enable_checkpointing": True},
            {"ckpt_path": folder / f"step={stop}.ckpt"},
        ):
            strategy = ByzantineDDPStrategy(on_breakdown="skip", max_skips=100)
            history = fit(strategy, Fuzzed(plan, quarantine), num_batches=len(plan), **arguments)
            results.append((history, strategy.quarantined))
    return results


@st.composite
def plans(draw: st.DrawFn) -> tuple[list[dict[int, str]], dict[int, int], int]:
    faults = st.dictionaries(st.integers(0, 4), st.sampled_from([name for name in FAULTS if name != "none"]))
    plan = draw(st.lists(faults, min_size=6, max_size=6))
    quarantine = draw(st.dictionaries(st.integers(0, 5), st.integers(0, 4), max_size=2))
    return plan, quarantine, draw(st.integers(1, 5))


@pytest.mark.slow
@settings(max_examples=6, phases=[Phase.generate], suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(case=plans())
def test_no_sequence_parts_the_ranks(
    five_ranks: RankPool, tmp_path: Path, case: tuple[list[dict[int, str]], dict[int, int], int]
) -> None:
    plan, quarantine, stop = case
    folder = Path(tempfile.mkdtemp(dir=tmp_path))
    whole, resumed = zip(*five_ranks.run(fit_fuzzed, folder, plan, quarantine, stop), strict=True)
    assert len(whole[0][0]) == len(plan) and len(resumed[0][0]) == len(plan) - stop
    for results in (whole, resumed):
        for history, quarantined in results:
            assert torch.equal(history, results[0][0])
            assert quarantined == set(quarantine.values())
            # Breakdowns are skipped, so that not even they leave anything behind.
            assert history.isfinite().all()


def error_of(bad: list[int], rule: Aggregator | None = None) -> tuple[list[int], str]:
    strategy = ByzantineDDPStrategy(rule, workers_per_process=5, estimator=None)
    simulation = ByzantineSimulation(NonFinite(), bad)
    with pytest.raises(ByzantineBreakdownError) as caught:
        fit(strategy, Quarantining([0]), callbacks=[simulation])
    return caught.value.workers, str(caught.value)


def test_errors_name_workers_as_before_the_quarantine(one_rank: RankPool) -> None:
    ((workers, message),) = one_rank.run(error_of, [3, 4])
    assert workers == [3, 4]
    assert message == "2 of 4 workers sent a non-finite or overflowing vector (workers 3, 4), but num_byzantine=1"
    ((workers, message),) = one_rank.run(error_of, [3], MoNNA(reference=3))
    assert workers == [3]
    assert message.startswith("the trusted worker 3 sent")


def quarantine_errors() -> list[str]:
    messages = []
    for workers in ([3], [0, 1, 2], "0"):
        with pytest.raises((ValueError, TypeError)) as caught:
            fit(ByzantineDDPStrategy(), Quarantining(workers))
        messages.append(str(caught.value))
    return messages


class Quarantining(Regression):
    def __init__(self, workers: Any) -> None:
        super().__init__()
        self.workers = workers
        self.unused = nn.Identity()

    def on_train_start(self) -> None:
        self.trainer.strategy.quarantine(self.workers)


def test_quarantine_of_wrong_workers_is_named(three_ranks: RankPool) -> None:
    first, second, third = three_ranks.run(quarantine_errors)[0]
    assert first == "workers must be indices in [0, 3) for 3 workers, got 3"
    assert "workers must leave at least one honest worker" in second
    assert "must be an int" in third
