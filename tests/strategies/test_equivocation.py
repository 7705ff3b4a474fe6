"""Training with a rank that tells others different things: the honest ones stay together, and know who it was."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
import torch.distributed as dist
from combinations import BatchNormed, UnusedOnSomeRanks
from lightning.pytorch.callbacks import ModelCheckpoint
from lying import saying
from rank_pool import RankPool
from torch import Tensor
from training import Regression, fit

from lightning_byzantine import ByzantineDDPStrategy
from lightning_byzantine.optim import DoubleMomentumEstimator

LIAR, HONEST = 1, (0, 2, 3, 4)
Forge = Callable[[Tensor, int], Tensor]


@contextmanager
def lying(forge: Forge | None, when: Callable[[Tensor], bool]) -> Iterator[None]:
    """Let rank 1 send each other one something else, of what ``when`` chooses by its looks."""
    if forge is None or dist.get_rank() != LIAR:
        yield
    else:
        with saying(lambda tensor, dst: forge(tensor, dst) if when(tensor) else tensor):
            yield


def is_row(tensor: Tensor) -> bool:
    return tensor.is_floating_point() and tensor.numel() > 100


def noise(row: Tensor, dst: int) -> Tensor:
    return row + torch.randn(row.shape, generator=torch.Generator().manual_seed(dst))


def names(flags: Tensor | None) -> list[int]:
    return [] if flags is None else flags.nonzero().flatten().tolist()


def fit_lying(
    forge: Forge | None,
    when: Callable[[Tensor], bool] = is_row,
    model: type[pl.LightningModule] = Regression,
    without: tuple[int, ...] = (),
    num_batches: int = 5,
    trainer_arguments: dict[str, Any] | None = None,
    **arguments: Any,
) -> tuple[Tensor, list[Tensor], list[list[int]], list[int]]:
    """Return all parameters after each step, the buffers, who was named in each step, and who was left out."""
    torch.manual_seed(3)
    strategy, module, named = ByzantineDDPStrategy(**arguments), model(), []
    strategy.observe(lambda report: named.append(names(report.equivocated)))
    callbacks: list[pl.Callback] = [LeavesOut(without)] if without else []
    options = trainer_arguments or {}
    with lying(forge, when):
        history = fit(strategy, module, num_batches, callbacks=callbacks + options.pop("callbacks", []), **options)
    return history, [buffer.clone() for buffer in module.buffers()], named, sorted(strategy.quarantined_by_proof)


class LeavesOut(pl.Callback):
    """Drops the rows of workers from the first step on."""

    def __init__(self, workers: tuple[int, ...]) -> None:
        self.workers = workers

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        trainer.strategy.quarantine(self.workers, proved=True)


def assert_together(results: list[Any], named: list[list[int]], left_out: list[int]) -> None:
    for rank in HONEST:
        history, buffers, who, proved = results[rank]
        assert torch.equal(history, results[0][0])
        assert all(torch.equal(buffer, first) for buffer, first in zip(buffers, results[0][1], strict=True))
        assert (who, proved) == (named, left_out)


@pytest.mark.parametrize(
    ("num_batches", "arguments"),
    [
        (5, {}),
        (5, {"estimator": DoubleMomentumEstimator()}),
        pytest.param(5, {"estimator": None}, marks=pytest.mark.slow),
        pytest.param(5, {"bucket_cap_mb": 0.0005}, marks=pytest.mark.slow),
        pytest.param(5, {"max_worker_grad_norm": 0.1}, marks=pytest.mark.slow),
        pytest.param(100, {}, marks=pytest.mark.slow),
    ],
    ids=str,
)
def test_whoever_sends_each_another_row_is_left_out(
    five_ranks: RankPool, num_batches: int, arguments: dict[str, Any]
) -> None:
    results = five_ranks.run(fit_lying, noise, num_batches=num_batches, **arguments)
    assert_together(results, [[LIAR]] + [[]] * (num_batches - 1), [LIAR])
    expected = five_ranks.run(fit_lying, None, without=(LIAR,), num_batches=num_batches, **arguments)
    assert torch.equal(results[0][0], expected[0][0])


def is_vote_on_buffers(tensor: Tensor) -> bool:
    # 8 bytes for names and shapes, and BatchNormed's buffers: 32 float32 numbers, one int64.
    return tensor.dtype == torch.uint8 and tensor.numel() == 8 + 4 * 32 + 8


def another_mean(message: Tensor, dst: int) -> Tensor:
    message[8] ^= 1 + dst
    return message


def test_whoever_votes_differently_on_buffers_is_left_out(five_ranks: RankPool) -> None:
    results = five_ranks.run(fit_lying, another_mean, is_vote_on_buffers, BatchNormed)
    # Ranks vote at the start of the second step.
    assert_together(results, [[], [LIAR], [], [], []], [LIAR])


def is_metric(tensor: Tensor) -> bool:
    return tensor.dtype == torch.float64 and tensor.numel() == 1


def test_whoever_reports_another_metric_to_each_is_left_out(five_ranks: RankPool) -> None:
    results = five_ranks.run(fit_lying, noise, is_metric, robust_metrics=True)
    assert_together(results, [[LIAR], [], [], [], []], [LIAR])


def is_flags(tensor: Tensor) -> bool:
    return tensor.dtype == torch.uint8 and tensor.numel() == sum(1 for _ in UnusedOnSomeRanks().parameters()) - 2


def other_flags(flags: Tensor, dst: int) -> Tensor:
    return flags ^ (dst // 2)


@pytest.mark.slow
def test_whoever_says_differently_what_it_has_used_is_left_out(five_ranks: RankPool) -> None:
    results = five_ranks.run(fit_lying, other_flags, is_flags, UnusedOnSomeRanks, find_unused_parameters=True)
    assert_together(results, [[LIAR], [], [], [], []], [LIAR])


def only_to_3(row: Tensor, dst: int) -> Tensor:
    return noise(row, dst) if dst == 3 else row


@pytest.mark.slow
def test_one_victim_gets_the_rows_from_others(five_ranks: RankPool) -> None:
    results = five_ranks.run(fit_lying, only_to_3)
    # It could have been the victim that lies.
    assert_together(results, [[]] * 5, [])
    assert torch.equal(results[0][0], five_ranks.run(fit_lying, None)[0][0])


@pytest.mark.slow
def test_a_process_lies_as_all_of_its_workers(five_ranks: RankPool) -> None:
    results = five_ranks.run(fit_lying, noise, num_batches=6, workers_per_process=2)
    for rank in HONEST:
        assert torch.equal(results[rank][0], results[0][0])
        assert results[rank][2:] == ([[2, 3], [], []], [2, 3])


def resumed(folder: Path, forge: Forge | None) -> Any:
    """Return the last two of four steps, with a checkpoint in between; a rank lies in the first two."""
    saving = {"callbacks": [ModelCheckpoint(folder, filename="half")], "enable_checkpointing": True, "max_epochs": 1}
    first = fit_lying(forge, num_batches=2, trainer_arguments=saving, robust_metrics=True)
    going_on = {"ckpt_path": str(folder / "half.ckpt"), "max_epochs": 2}
    return first, fit_lying(None, num_batches=2, trainer_arguments=going_on, robust_metrics=True)


@pytest.mark.slow
def test_who_was_left_out_stays_out_after_resuming(five_ranks: RankPool, tmp_path: Path) -> None:
    whole = five_ranks.run(fit_lying, noise, num_batches=2, trainer_arguments={"max_epochs": 2}, robust_metrics=True)
    halves = five_ranks.run(resumed, tmp_path, noise)
    for rank in HONEST:
        (first, *_), (second, _, _, proved) = halves[rank]
        assert torch.equal(torch.cat([first, second]), whole[0][0])
        assert proved == [LIAR]


@pytest.mark.slow
def test_shadow_mode_trains_as_stock_ddp_does_and_so_is_divided(five_ranks: RankPool) -> None:
    results = five_ranks.run(fit_lying, noise, shadow=True)
    assert not torch.equal(results[0][0], results[2][0])
    assert results[0][2:] == ([[]] * 5, [])
