"""Ranks that go different ways: all end within seconds, and say which rank is where."""

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from parting import BATCH_OF_FAULT, CASES, NUM_BATCHES, NUM_RANKS, Case, Outcome, outcomes_of_processes, train
from rank_pool import RankPool

SECONDS = 10


@pytest.fixture
def ranks() -> Iterator[RankPool]:
    """Give new processes, since connections are cut."""
    pool = RankPool(NUM_RANKS)
    yield pool
    pool.close()


def check(case: Case, outcomes: list[Outcome]) -> None:
    for rank, outcome in enumerate(outcomes):
        is_faulty = case.rank in (None, rank)
        # Where ranks have no error of their own, all say the same.
        expected = case.own if is_faulty or not case.others else case.others
        assert expected in outcome.message, (rank, outcome)
        assert bool(outcome.error)
        assert outcome.seconds < SECONDS


def name(case: Case) -> str:
    return f"{case.fault}, {'all ranks' if case.rank is None else f'rank {case.rank}'}"


ERRORS = [case for case in CASES if "SIGTERM" not in case.fault]
QUICK = {"one more batch", "one more batch to validate", "a metric on one rank", "exception in backward"}


@pytest.mark.parametrize(
    "case", [pytest.param(c, id=name(c), marks=[] if c.fault in QUICK else pytest.mark.slow) for c in ERRORS]
)
def test_every_rank_names_the_rank_that_is_elsewhere(ranks: RankPool, case: Case) -> None:
    check(case, ranks.run(train, case.fault, case.rank))


@pytest.mark.slow
@pytest.mark.parametrize("case", [pytest.param(case, id=name(case)) for case in ERRORS[:5]])
@pytest.mark.parametrize("arguments", [{"exchange": "all_to_all"}, {"robust_metrics": True}, {"shadow": True}], ids=str)
def test_with_every_exchange(ranks: RankPool, case: Case, arguments: dict[str, object]) -> None:
    check(case, ranks.run(train, case.fault, case.rank, **arguments))


@pytest.mark.parametrize("fault", ["None", "a loss without a graph"])
def test_a_rank_without_a_loss_is_excluded_if_failed_ones_are(ranks: RankPool, fault: str) -> None:
    for outcome in ranks.run(train, fault, 1, on_worker_error="exclude"):
        assert (outcome.error, outcome.message) == ("", "")


@pytest.mark.parametrize(
    ("fault", "rank", "step"),
    [
        ("SIGTERM", 1, BATCH_OF_FAULT + 1),
        pytest.param("SIGTERM", None, BATCH_OF_FAULT + 1, marks=pytest.mark.slow),
        ("SIGTERM in validation", 1, NUM_BATCHES),
    ],
)
def test_a_signal_to_stop_ends_all_before_the_same_batch(
    ranks: RankPool, tmp_path: Path, fault: str, rank: int | None, step: int
) -> None:
    for outcome in ranks.run(train, fault, rank, tmp_path):
        assert outcome.error == "SIGTERMException"
        assert outcome.seconds < SECONDS
    (checkpoint,) = tmp_path.glob("*.ckpt")
    assert torch.load(checkpoint, weights_only=False)["global_step"] == step


@pytest.mark.slow
@pytest.mark.parametrize(
    ("fault", "rank", "launcher"),
    [
        ("one batch less", 0, "lightning"),
        ("exception in training_step", 0, "torchrun"),
        ("SIGTERM", 1, "lightning"),
        ("SIGTERM", None, "torchrun"),
    ],
)
def test_under_launchers(fault: str, rank: int | None, launcher: str, tmp_path: Path) -> None:
    (case,) = [case for case in CASES if (case.fault, case.rank) == (fault, rank)]
    outcomes = outcomes_of_processes(case, launcher, tmp_path)
    check(case, outcomes)
    if fault == "SIGTERM":
        assert {outcome.error for outcome in outcomes} == {"SIGTERMException"}
        assert len(list(tmp_path.glob("*.ckpt"))) == 1
