"""One process that acts as k workers, against k processes that are one worker each."""

import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.callbacks import GradientAccumulationScheduler, ModelCheckpoint
from pairs import pairwise
from rank_pool import RankPool
from torch import Tensor, nn
from torch.utils.data import DataLoader
from training import Regression, parameters, trainer

from lightning_byzantine import ByzantineBreakdownError, ByzantineDDPStrategy
from lightning_byzantine.aggregators import CTMA, Aggregator, CoordinateWiseMedian, Krum, Mean
from lightning_byzantine.attacks import Attack, DataAttack, InnerProductManipulation, NonFinite, SignFlip
from lightning_byzantine.callbacks import ByzantineSimulation
from lightning_byzantine.estimators import WorkerMomentum
from lightning_byzantine.optim import DoubleMomentumEstimator

DOUBLE_MOMENTUM = DoubleMomentumEstimator(min_beta=0.2, min_gamma=0.2, weighted=False)


def batches_in_order(num_workers: int, num_steps: int, per_worker: int = 1) -> list[list[Tensor]]:
    """Return this rank's batches: of each step, for each round, those of its workers in turn."""
    num_ranks, rank = torch.distributed.get_world_size(), torch.distributed.get_rank()
    k = num_workers // num_ranks
    batches = []
    for step in range(num_steps):
        for turn in range(per_worker):
            for worker in range(rank * k, rank * k + k):
                generator = torch.Generator().manual_seed(1_000_000 * step + 1_000 * turn + worker)
                inputs = torch.randn(4, 8, generator=generator)
                batches.append([inputs, torch.sin(inputs.sum(1, keepdim=True)) + 0.1 * worker])
    return batches


class ParametersOfEveryWindow(pl.Callback):
    def __init__(self) -> None:
        self.history: list[Tensor] = []

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *args: Any) -> None:
        if not trainer.fit_loop._should_accumulate():
            self.history.append(parameters(pl_module))


def fit_workers(
    num_workers: int,
    num_steps: int = 8,
    per_worker: int = 1,
    model: type[pl.LightningModule] = Regression,
    callbacks: list[pl.Callback] | None = None,
    ckpt_path: str | None = None,
    trainer_options: dict[str, Any] | None = None,
    **strategy_options: Any,
) -> Tensor:
    """Train; return the parameters after each step."""
    torch.manual_seed(5)
    k = num_workers // torch.distributed.get_world_size()
    options: dict[str, Any] = {"use_distributed_sampler": False} | (trainer_options or {})
    if per_worker > 1:
        options["accumulate_grad_batches"] = k * per_worker
    history = ParametersOfEveryWindow()
    loader = DataLoader(batches_in_order(num_workers, num_steps, per_worker), batch_size=None)
    strategy = ByzantineDDPStrategy(workers_per_process=k, **strategy_options)
    trainer(strategy, callbacks=[history, *(callbacks or [])], **options).fit(model(), loader, ckpt_path=ckpt_path)
    return torch.stack(history.history)


def assert_all_close(results: list[Tensor], expected: Tensor) -> None:
    for result in results:
        assert torch.equal(result, results[0])
        torch.testing.assert_close(result, expected, rtol=0, atol=1e-6)


ESTIMATORS = {"auto": "auto", "none": None, "opaque": WorkerMomentum(transparent=False), "double": DOUBLE_MOMENTUM}


@pytest.mark.parametrize("estimator", ESTIMATORS)
@pytest.mark.parametrize("rule", [Mean(), CTMA(CoordinateWiseMedian()), Krum()], ids=repr)
def test_one_process_trains_as_three(
    one_rank: RankPool, three_ranks: RankPool, rule: Aggregator, estimator: str
) -> None:
    options = {"aggregator": rule, "num_byzantine": 0 if isinstance(rule, Mean) else 1}
    options["estimator"] = ESTIMATORS[estimator]
    expected = three_ranks.run(fit_workers, 3, **options)
    assert_all_close(one_rank.run(fit_workers, 3, **options), expected[0])


@pytest.mark.parametrize("exchange", ["all_gather", "all_to_all"])
@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_three_processes_of_two_train_as_one_of_six(
    one_rank: RankPool, three_ranks: RankPool, exchange: str, estimator: str
) -> None:
    options = {"num_byzantine": 2, "estimator": ESTIMATORS[estimator]}
    expected = one_rank.run(fit_workers, 6, **options)
    assert_all_close(three_ranks.run(fit_workers, 6, exchange=exchange, **options), expected[0])


@pytest.mark.parametrize("estimator", ["auto", "double"])
def test_several_batches_a_worker(one_rank: RankPool, three_ranks: RankPool, estimator: str) -> None:
    options = {"per_worker": 2, "max_worker_grad_norm": 0.5, "estimator": ESTIMATORS[estimator]}
    expected = three_ranks.run(fit_workers, 3, **options)
    assert_all_close(one_rank.run(fit_workers, 3, **options), expected[0])


@pytest.mark.parametrize("num_workers", [5, pytest.param(17, marks=pytest.mark.slow)])
def test_many_workers(one_rank: RankPool, num_workers: int) -> None:
    pool = RankPool(num_workers)
    try:
        for estimator in ("auto", "double"):
            for rule in (Mean(), None):
                options = {"aggregator": rule, "estimator": ESTIMATORS[estimator], "num_steps": 4}
                options["num_byzantine"] = 0 if rule else (num_workers - 1) // 2
                expected = pool.run(fit_workers, num_workers, **options)
                assert_all_close(one_rank.run(fit_workers, num_workers, **options), expected[0])
    finally:
        pool.close()


class UnusedBySome(Regression):
    """A layer that only worker 1 uses, and one that only worker 2 uses."""

    def __init__(self) -> None:
        super().__init__()
        self.of_worker_1 = nn.Linear(8, 1)
        self.of_worker_2 = nn.Linear(8, 1)

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        worker = batch_idx % 3 if self.trainer.world_size == 1 else self.global_rank
        loss = super().training_step(batch, batch_idx)
        if worker == 1:
            loss = loss + self.of_worker_1(batch[0]).square().mean()
        if worker == 2:
            loss = loss + self.of_worker_2(batch[0]).square().mean()
        return loss


@pytest.mark.parametrize("estimator", ["auto", "none"])
def test_a_parameter_that_some_workers_leave_unused(one_rank: RankPool, three_ranks: RankPool, estimator: str) -> None:
    options = {"model": UnusedBySome, "aggregator": Mean(), "num_byzantine": 0, "estimator": ESTIMATORS[estimator]}
    options["find_unused_parameters"] = True
    expected = three_ranks.run(fit_workers, 3, **options)
    assert_all_close(one_rank.run(fit_workers, 3, **options), expected[0])


class ZeroedGradients(Regression):
    """Sets gradients to zero and not to None, so that DDP's buckets stay where they are."""

    def optimizer_zero_grad(self, epoch: int, batch_idx: int, optimizer: torch.optim.Optimizer) -> None:
        optimizer.zero_grad(set_to_none=False)


@pytest.mark.parametrize("model", [Regression, ZeroedGradients])
def test_gradients_that_are_views_of_buckets(one_rank: RankPool, model: type[pl.LightningModule]) -> None:
    options = {"model": model, "num_byzantine": 1}
    expected = one_rank.run(fit_workers, 3, **options)
    assert_all_close(one_rank.run(fit_workers, 3, gradient_as_bucket_view=True, **options), expected[0])


class Convolutional(Regression):
    def __init__(self) -> None:
        super().__init__()
        self.network = nn.Sequential(nn.Unflatten(1, (2, 2, 2)), nn.Conv2d(2, 4, 2), nn.Flatten(), nn.Linear(4, 1))


class ChannelsLast(Convolutional):
    def __init__(self) -> None:
        super().__init__()
        self.network.to(memory_format=torch.channels_last)


@pytest.mark.parametrize("num_workers", [1, 3])
@pytest.mark.parametrize("estimator", ["opaque", "double"])
def test_parameters_that_are_not_in_the_order_of_their_indices(
    one_rank: RankPool, num_workers: int, estimator: str
) -> None:
    options = {"num_byzantine": 0, "estimator": ESTIMATORS[estimator], "max_worker_grad_norm": 0.5}
    expected = one_rank.run(fit_workers, num_workers, model=Convolutional, **options)
    assert_all_close(one_rank.run(fit_workers, num_workers, model=ChannelsLast, **options), expected[0])


class Negate(DataAttack):
    def poison(self, batch: Any) -> Any:
        return [batch[0], -batch[1]]


@pairwise(
    attack=[SignFlip(), InnerProductManipulation(), Negate(), NonFinite()],
    byzantine=[[0], [4, 5]],
    exchange=["all_gather", "all_to_all"],
)
def test_attacks_speak_of_workers(
    one_rank: RankPool, three_ranks: RankPool, attack: Attack, byzantine: list[int], exchange: str
) -> None:
    options = {"callbacks": [ByzantineSimulation(attack, byzantine)]}
    expected = one_rank.run(fit_workers, 6, **options)[0]
    assert expected.isfinite().all()
    assert not torch.allclose(expected, one_rank.run(fit_workers, 6)[0])
    assert_all_close(three_ranks.run(fit_workers, 6, exchange=exchange, **options), expected)


class NotFiniteForWorker(Regression):
    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        loss = super().training_step(batch, batch_idx)
        return loss * torch.nan if batch_idx % 3 == 1 else loss


def test_a_worker_that_is_not_finite_is_left_out(one_rank: RankPool) -> None:
    (history,) = one_rank.run(fit_workers, 3, model=NotFiniteForWorker, num_byzantine=1)
    assert history.isfinite().all()
    assert (history.diff(dim=0).norm(dim=1) > 0).all()


def fit_broken() -> list[int]:
    class NotFinite(Regression):
        def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
            loss = super().training_step(batch, batch_idx)
            return loss * torch.nan if batch_idx % 5 in (1, 2, 4) else loss

    with pytest.raises(ByzantineBreakdownError) as raised:
        fit_workers(5, model=NotFinite)
    return raised.value.workers


def test_a_breakdown_names_workers(one_rank: RankPool) -> None:
    assert one_rank.run(fit_broken) == [[1, 2, 4]]


@pytest.mark.parametrize("estimator", ["auto", "double"])
def test_the_end_of_an_epoch_is_left_out(one_rank: RankPool, estimator: str) -> None:
    # Seven batches are two windows of three: the third is cut short, in the middle of the run.
    history = one_rank.run(fit_cut_short, 7, ESTIMATORS[estimator])[0]
    expected = one_rank.run(fit_cut_short, 6, ESTIMATORS[estimator])[0]
    assert torch.equal(history, expected)


def fit_cut_short(num_batches: int, estimator: Any) -> Tensor:
    torch.manual_seed(5)
    model = Regression()
    loader = DataLoader(batches_in_order(3, 3)[:num_batches], batch_size=None)
    strategy = ByzantineDDPStrategy(workers_per_process=3, estimator=estimator)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        trainer(strategy, max_epochs=2, use_distributed_sampler=False).fit(model, loader)
    messages = [str(warning.message) for warning in caught if "workers_per_process" in str(warning.message)]
    assert bool(messages) == (num_batches % 3 > 0)
    if messages:
        assert "after 1 of workers_per_process=3 batches" in messages[0]
    return parameters(model)


@pytest.mark.parametrize("estimator", ["auto", "double"])
def test_a_checkpoint_does_not_mind_how_workers_are_shared_out(
    one_rank: RankPool, three_ranks: RankPool, tmp_path: Path, estimator: str
) -> None:
    options = {"estimator": ESTIMATORS[estimator], "num_byzantine": 2}
    whole = one_rank.run(fit_two_epochs, 2, None, str(tmp_path / "whole"), options)[0]
    for first, second in ((one_rank, three_ranks), (three_ranks, one_rank), (one_rank, one_rank)):
        folder = tmp_path / f"{first.num_ranks}-{second.num_ranks}"
        first.run(fit_two_epochs, 1, None, str(folder), options)
        resumed = second.run(fit_two_epochs, 2, str(folder / "last.ckpt"), str(folder), options)
        assert_all_close(resumed, whole)


def fit_two_epochs(max_epochs: int, ckpt_path: str | None, folder: str, options: dict[str, Any]) -> Tensor:
    callbacks = [ModelCheckpoint(folder, save_last=True)]
    trainer_options = {"max_epochs": max_epochs, "enable_checkpointing": True}
    return fit_workers(6, 4, callbacks=callbacks, ckpt_path=ckpt_path, trainer_options=trainer_options, **options)[-1]


def accumulations() -> Iterator[Any]:
    model = Regression()
    loader = DataLoader(batches_in_order(3, 2), batch_size=None)
    for given in (1, 6):
        fitter = trainer(ByzantineDDPStrategy(workers_per_process=3), accumulate_grad_batches=given)
        seen = []

        class See(pl.Callback):
            def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule, seen: list = seen) -> None:
                seen.append((trainer.accumulate_grad_batches, trainer.strategy.num_workers))

        fitter.callbacks.append(See())
        fitter.fit(model, loader)
        yield given, seen, fitter.accumulate_grad_batches


def test_accumulate_grad_batches_follows_and_is_given_back(one_rank: RankPool) -> None:
    assert one_rank.run(list_accumulations) == [[(1, [(3, 3)], 1), (6, [(6, 3)], 6)]]


def list_accumulations() -> list[Any]:
    return list(accumulations())


class Manual(Regression):
    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False


def refusals() -> list[str]:
    messages = []
    scheduled = {"callbacks": [GradientAccumulationScheduler({1: 6})]}
    for model, options in ((Regression(), {"accumulate_grad_batches": 4}), (Manual(), {}), (Regression(), scheduled)):
        fitter = trainer(ByzantineDDPStrategy(workers_per_process=3), **options)
        with pytest.raises(MisconfigurationException) as raised:
            fitter.fit(model, DataLoader(batches_in_order(3, 4), batch_size=None))
        messages.append(str(raised.value))
    return messages


def test_windows_that_do_not_fit_are_refused(one_rank: RankPool) -> None:
    ((four, manual, scheduled),) = one_rank.run(refusals)
    expected = "accumulate_grad_batches must be a multiple of workers_per_process, got accumulate_grad_batches=4"
    assert expected in four
    assert "workers_per_process=3 needs automatic optimization" in manual
    assert "got a GradientAccumulationScheduler" in scheduled


def test_arguments_are_checked() -> None:
    with pytest.raises(ValueError, match="workers_per_process must be at least 1, got 0"):
        ByzantineDDPStrategy(workers_per_process=0)
    strategy = ByzantineDDPStrategy(workers_per_process=5, num_byzantine=3)
    with pytest.raises(ValueError, match="got f=3 with m=5 workers"):
        pl.Trainer(strategy=strategy, accelerator="cpu", devices=1, logger=False)
