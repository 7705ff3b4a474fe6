"""Ranks whose parameters or optimizer state have come to differ."""

from typing import Any

import pytest
import torch
from rank_pool import RankPool
from torch import Tensor
from training import Regression, fit

from lightning_byzantine import ByzantineDDPStrategy, InconsistentRanksError
from lightning_byzantine.aggregators import Bucketing, CoordinateWiseMedian
from lightning_byzantine.optim import DoubleMomentumEstimator


class Corrupted(Regression):
    """On some ranks, one bit flips after batch 4: in a parameter, in the optimizer's or the estimator's state."""

    def __init__(self, ranks: list[int], where: str, optimizer: str = "Adam") -> None:
        super().__init__(optimizer)
        self.ranks, self.where = ranks, where

    def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
        if self.global_rank not in self.ranks or batch_idx != 4:
            return
        first = self.trainer.optimizers[0]
        state = first.state_dict()["state"].get(0, {})
        targets = {
            "parameter": self.network[0].weight.data,
            "moment": state.get("exp_avg"),
            "momentum": state.get("momentum_buffer"),
        }
        if self.where == "aggregate":
            targets["aggregate"] = self.trainer.strategy.estimator.shared_state()["network.0.weight"]
        if self.where == "learning rate":
            first.param_groups[0]["lr"] *= 2
        elif self.where == "layout":
            first.param_groups[0]["momentum"] = None
        else:
            flip_a_bit(targets[self.where], self.global_rank)


def flip_a_bit(values: Tensor, rank: int) -> None:
    # High enough in the mantissa not to be rounded away in the next step, after which nothing would differ.
    values.view(-1)[3].view(torch.int32).bitwise_xor_(1 << (6 + rank))


def fit_corrupted(
    ranks: list[int], where: str = "parameter", optimizer: str = "Adam", **arguments: Any
) -> tuple[Tensor | None, str, list[int]]:
    """Return the parameters, or what was said instead, and who was named."""
    torch.manual_seed(3)
    strategy = ByzantineDDPStrategy(check_consistency_every_n_steps=3, **arguments)
    try:
        return fit(strategy, Corrupted(ranks, where, optimizer)), "", []
    except InconsistentRanksError as error:
        return None, str(error), error.ranks


WHERE = ["parameter", "moment", "aggregate", "learning rate"]


@pytest.mark.parametrize("where", [*WHERE, "layout"])
@pytest.mark.parametrize("rank", [0, 2])
def test_a_flipped_bit_is_found_and_its_rank_named(three_ranks: RankPool, where: str, rank: int) -> None:
    differ = f"the parameters or the optimizer state of rank {rank} differ from those of the other 2"
    message = f"After 6 optimizer steps, {differ}"
    assert three_ranks.run(fit_corrupted, [rank], where) == [(None, message, [rank])] * 3


def test_no_majority(three_ranks: RankPool) -> None:
    for _, said, ranks in three_ranks.run(fit_corrupted, [0, 1], on_inconsistency="restore"):
        assert ranks == []
        assert said == (
            "After 6 optimizer steps, the parameters or the optimizer state differ, and no majority of the 3 ranks"
            " agrees"
        )


def test_nothing_is_looked_for_by_default(three_ranks: RankPool) -> None:
    first, second, _ = three_ranks.run(fit_corrupted_unwatched)
    assert not torch.equal(first, second)


def fit_corrupted_unwatched() -> Tensor:
    torch.manual_seed(3)
    return fit(ByzantineDDPStrategy(), Corrupted([0], "parameter"))


@pytest.mark.parametrize("where", WHERE)
def test_the_majority_restores_what_was_lost(three_ranks: RankPool, where: str) -> None:
    whole = three_ranks.run(fit_corrupted, [], where)
    for rank in (0, 2):
        assert_restored(three_ranks.run(fit_corrupted, [rank], where, on_inconsistency="restore"), whole)


def assert_restored(results: list[Any], whole: list[Any]) -> None:
    """After step 6, on all ranks alike; in that step, the rank's own gradient was not the one it would have been."""
    for history, _, _ in results:
        assert torch.equal(history[6:], results[0][0][6:])
        torch.testing.assert_close(history[6:], whole[0][0][6:], rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    "arguments",
    [
        {"estimator": None},
        {"aggregator": Bucketing(CoordinateWiseMedian(), bucket_size=1)},
        {"estimator": DoubleMomentumEstimator(), "optimizer": "SGD", "where": "momentum"},
        {"exchange": "all_to_all"},
    ],
    ids=str,
)
def test_restores_under_other_estimators_and_rules(three_ranks: RankPool, arguments: dict[str, Any]) -> None:
    whole = three_ranks.run(fit_corrupted, [], **arguments)
    assert_restored(three_ranks.run(fit_corrupted, [1], on_inconsistency="restore", **arguments), whole)


def test_says_what_it_knows() -> None:
    with pytest.raises(ValueError, match="on_inconsistency must be one of raise, restore, got 'ignore'"):
        ByzantineDDPStrategy(on_inconsistency="ignore")
    with pytest.raises(ValueError, match="check_consistency_every_n_steps must be at least 0, got -1"):
        ByzantineDDPStrategy(check_consistency_every_n_steps=-1)
