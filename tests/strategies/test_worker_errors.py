"""One rank's training step raises; the others go on."""

import warnings
from typing import Any

import pytest
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from rank_pool import RankPool
from torch import Tensor, nn
from training import Regression, fit

from lightning_byzantine import ByzantineBreakdownError, ByzantineDDPStrategy
from lightning_byzantine.optim import DoubleMomentumEstimator
from lightning_byzantine.strategies.worker_errors import WorkerErrors


class Failing(Regression):
    """Some ranks raise at some batches, in the middle of the step."""

    def __init__(self, ranks: list[int], batches: list[int], fault: str = "raise") -> None:
        super().__init__()
        self.ranks, self.batches, self.fault = ranks, batches, fault

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        inputs, targets = batch
        loss = nn.functional.mse_loss(self(inputs), targets)
        if self.global_rank in self.ranks and batch_idx in self.batches:
            if self.fault == "raise":
                raise IndexError(f"no row {batch_idx} in my shard")
            return loss * torch.nan
        return loss


def fit_failing(
    ranks: list[int], batches: list[int], fault: str = "raise", trainer_arguments: Any = None, **arguments: Any
) -> tuple[Tensor, list[str], int]:
    torch.manual_seed(3)
    strategy = ByzantineDDPStrategy(on_worker_error="exclude", **arguments)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        history = fit(strategy, Failing(ranks, batches, fault), **(trainer_arguments or {}))
    said = [str(warning.message) for warning in caught if "is excluded from that step" in str(warning.message)]
    return history, said, strategy.worker_errors.count


@pytest.mark.parametrize(
    "arguments",
    [
        {},
        {"exchange": "all_to_all"},
        {"find_unused_parameters": True},
        {"static_graph": True},
        {"max_worker_grad_norm": 1.0},
        {"estimator": DoubleMomentumEstimator()},
        {"trainer_arguments": {"accumulate_grad_batches": 2}},
        {"trainer_arguments": {"precision": "bf16-mixed"}},
    ],
    ids=str,
)
def test_a_failed_step_is_one_with_a_non_finite_row(three_ranks: RankPool, arguments: dict[str, Any]) -> None:
    results = three_ranks.run(fit_failing, [0], [0, 3, 4], **arguments)
    # Anyone's NaN is dropped: this is what should happen to those who raise.
    expected = three_ranks.run(fit_failing, [0], [0, 3, 4], fault="nan", **arguments)
    for history, _, _ in results:
        assert torch.equal(history, results[0][0])
        assert history.isfinite().all()
        torch.testing.assert_close(history, expected[0][0], rtol=0, atol=0)


def test_the_rank_is_named_with_the_error_and_its_place(three_ranks: RankPool) -> None:
    results = three_ranks.run(fit_failing, [1], [3, 4])
    assert [count for *_, count in results] == [0, 2, 0]
    (_, none, _), (_, said, _), _ = results
    assert none == []
    assert len(said) == 2
    assert "Rank 1 failed in its training step at batch 4" in said[1]
    assert "2 failures so far" in said[1]
    assert "IndexError: no row 4 in my shard" in said[1]
    assert "test_worker_errors.py:" in said[1]


def fit_until_all_fail() -> tuple[list[int], str]:
    with pytest.raises(ByzantineBreakdownError) as caught:
        fit_failing([0, 1, 2], [3])
    return caught.value.workers, "".join(caught.value.__notes__)


def test_everybody_failing_ends_the_run_with_the_reason(three_ranks: RankPool) -> None:
    for workers, notes in three_ranks.run(fit_until_all_fail):
        assert workers == [0, 1, 2]
        assert "`training_step` failed 1 times. IndexError: no row 3 in my shard" in notes


def error_without_anybody_else(**arguments: Any) -> str:
    with pytest.raises(IndexError) as caught:
        fit(ByzantineDDPStrategy(**arguments), Failing([0], [3]))
    return str(caught.value)


@pytest.mark.parametrize("arguments", [{}, {"on_worker_error": "exclude"}], ids=str)
def test_one_rank_alone_raises(one_rank: RankPool, arguments: dict[str, Any]) -> None:
    assert one_rank.run(error_without_anybody_else, **arguments) == ["no row 3 in my shard"]


@pytest.mark.parametrize("estimator", ["auto", DoubleMomentumEstimator()], ids=str)
def test_a_worker_of_several_in_one_process_is_excluded(one_rank: RankPool, estimator: Any) -> None:
    # Of five workers, the second and the fifth fail, in the last step too, with which DDP's own buckets arrive.
    arguments = {"workers_per_process": 5, "estimator": estimator}
    ((history, said, count),) = one_rank.run(fit_failing, [0], [1, 4, 9], **arguments)
    ((expected, *_),) = one_rank.run(fit_failing, [0], [1, 4, 9], fault="nan", **arguments)
    assert history.isfinite().all()
    assert torch.equal(history, expected)
    assert count == (3 if estimator == "auto" else 4)  # once more at the previous point
    assert len(said) == count


def keep_a_patch() -> tuple[bool, bool]:
    model = Failing([0], [3])
    patched: Any = model.training_step
    model.training_step = patched  # as of torch.compile
    fit(ByzantineDDPStrategy(on_worker_error="exclude"), model)
    kept = model.training_step is patched
    plain = Failing([0], [3])
    fit(ByzantineDDPStrategy(on_worker_error="exclude"), plain)
    return kept, "training_step" in vars(plain)


def test_the_module_gets_its_training_step_back(three_ranks: RankPool) -> None:
    assert three_ranks.run(keep_a_patch) == [(True, False)] * 3


class Manual(Failing):
    def __init__(self) -> None:
        super().__init__([], [])
        self.automatic_optimization = False


class SyncNormed(Failing):
    def __init__(self) -> None:
        super().__init__([], [])
        self.network.append(nn.SyncBatchNorm(1))


def refusal(model: type[Regression]) -> str:
    with pytest.raises(MisconfigurationException) as caught:
        fit(ByzantineDDPStrategy(on_worker_error="exclude"), model())
    return str(caught.value)


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (Manual, "automatic_optimization=False"),
        (Regression, "self.log('loss', sync_dist=True) in `training_step` communicates"),
    ],
)
def test_refuses_steps_that_others_would_wait_in(three_ranks: RankPool, model: type[Regression], message: str) -> None:
    assert all(message in said for said in three_ranks.run(refusal, model))


def test_refuses_sync_batch_norm() -> None:
    with pytest.raises(MisconfigurationException, match="SyncBatchNorm communicates"):
        WorkerErrors(SyncNormed())  # which DDP has on GPUs only


def test_says_what_it_knows() -> None:
    with pytest.raises(ValueError, match="on_worker_error must be one of raise, exclude, got 'ignore'"):
        ByzantineDDPStrategy(on_worker_error="ignore")
