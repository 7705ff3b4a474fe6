from itertools import combinations
from math import log2
from statistics import median

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from lightning_byzantine.aggregators import Krum
from lightning_byzantine.matrix import WorkerMatrix
from lightning_byzantine.monitoring.audit_order import audit_order
from lightning_byzantine.monitoring.crowding import Crowding, crowding


def honest(m: int, columns: int = 300, seed: int = 1) -> Tensor:
    return torch.randn(m, columns, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@settings(max_examples=30)
@given(m=st.integers(3, 8), columns=st.integers(1, 6), seed=st.integers(0, 100))
def test_follows_the_formula(m: int, columns: int, seed: int) -> None:
    rows = honest(m, columns, seed)
    distances = {pair: float((rows[pair[0]] - rows[pair[1]]).norm()) for pair in combinations(range(m), 2)}
    values = sorted(distances.values())
    # Of an even number, the lower one, as in torch.
    usual = values[(len(values) - 1) // 2]
    assert usual <= median(values)
    for worker, value in enumerate(crowding(rows @ rows.T).tolist()):
        nearest = min(distance for pair, distance in distances.items() if worker in pair)
        assert value == pytest.approx(min(max(log2(usual / nearest), 0), 5), abs=1e-6)


@pytest.mark.parametrize("m", [3, 5, 9, 17])
def test_those_who_copy_one_another_are_close_and_nobody_else(m: int) -> None:
    rows, f = honest(m), (m - 1) // 2
    rows[1 : f + 1] = rows[0] + 0.05 * rows[1 : f + 1]
    close = crowding(rows @ rows.T)
    assert bool((close[: f + 1] > 3).all()) and bool((close[f + 1 :] < 0.5).all())


def test_exact_copies_count_as_close_and_all_alike_as_normal() -> None:
    rows = honest(5)
    rows[1] = rows[0]
    assert crowding(rows @ rows.T)[:2].tolist() == [5.0, 5.0]
    same = honest(1).expand(5, -1)
    assert crowding(0 * (same @ same.T)).tolist() == [0.0] * 5


def test_averages_over_steps_and_leaves_out_what_is_unknown() -> None:
    close = Crowding(5)
    for step in range(60):
        rows = honest(5, seed=step)
        rows[1] = rows[0]
        rows[4, 0] = torch.nan if step > 0 else 0.0
        close.update(Krum().decide(WorkerMatrix([rows]), 1).report())
    assert min(close.averages[:2]) > 4 and max(close.averages[2:]) < 0.5
    other = Crowding(5)
    other.load_state_dict(close.state_dict())
    assert other.averages == close.averages


def test_who_stands_out_or_crowds_is_audited_first_and_each_in_turn() -> None:
    scores, close, audits = [0.0, 0.1, 1.4, 0.0, 0.0], [4.0, 4.0, 0.0, 0.0, 0.0], [0] * 5
    turns = []
    for _ in range(10):
        turns.append(audit_order(scores, close, audits, cleared=[])[0])
        audits[turns[-1]] += 1
    assert turns == [0, 1, 2, 3, 4] * 2 or turns == [0, 1, 2, 4, 3] * 2
    assert audit_order(scores, close, [0] * 5, cleared=[0], excluded=[1]) == [2, 0, 3, 4]
