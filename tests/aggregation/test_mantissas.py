import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from lightning_byzantine.aggregation.mantissas import count_bits, unlikely_bits
from lightning_byzantine.aggregation.observers import Observers
from lightning_byzantine.aggregation.quarantine import Quarantine
from lightning_byzantine.aggregation.robust_aggregation import RobustAggregation
from lightning_byzantine.aggregators import CTMA, Aggregator, CoordinateWiseMedian, Krum, Mean, Report
from lightning_byzantine.matrix import WorkerMatrix


def values(seed: int, workers: int = 5, columns: int = 3000) -> Tensor:
    """Return values of many sizes, as gradients are."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(workers, columns, generator=generator) * torch.randn(columns, generator=generator).exp()


def unlikely(rows: Tensor) -> list[int] | None:
    found = unlikely_bits(count_bits(rows, rows.shape[1]))
    return None if found is None else found.nonzero().flatten().tolist()


@given(seed=st.integers(0, 10**6), worker=st.integers(0, 4), bit=st.integers(3, 22), stuck=st.booleans())
def test_a_stuck_bit_is_found(seed: int, worker: int, bit: int, stuck: bool) -> None:
    rows = values(seed)
    bits = rows[worker].view(torch.int32)
    bits |= 1 << bit
    if not stuck:
        bits ^= 1 << bit
    assert unlikely(rows) == [worker]


@given(seed=st.integers(0, 10**6), bad=st.sampled_from([[0], [4], [1, 3]]))
def test_flips_of_the_highest_bit_are_found(seed: int, bad: list[int]) -> None:
    rows = values(seed)
    rows[bad] = rows[bad].view(torch.int32).bitwise_xor(1 << 22).view(torch.float32)
    assert unlikely(rows) == bad


@given(
    seed=st.integers(0, 10**6),
    repeats=st.sampled_from([1, 4]),
    dtype=st.sampled_from([torch.float32, torch.float16, torch.bfloat16, torch.float64]),
    scale=st.sampled_from([1.0, -3.0, 1e-3]),
)
def test_sound_workers_have_likely_bits(seed: int, repeats: int, dtype: torch.dtype, scale: float) -> None:
    rows = values(seed, columns=3000 // repeats).repeat(1, repeats)
    rows[2] *= scale
    rows[:, :500] = 0
    assert unlikely(rows.to(dtype)) == []


def test_rows_of_nothing_or_of_nan_are_no_reason_to_fail() -> None:
    rows = values(1)
    rows[0], rows[1] = 0, torch.nan
    assert unlikely(rows) == []
    assert unlikely(0 * rows[2:]) is None
    assert unlikely(rows[2:, :0]) is None


@pytest.mark.parametrize("repeats", [1, 4, 16])
def test_colluders_who_copy_one_worker_do_not_make_the_others_unlikely(repeats: int) -> None:
    for seed in range(30):
        rows = values(seed, columns=3000 // repeats).repeat(1, repeats)
        rows[3:] = rows[0]
        assert unlikely(rows) == []


def test_few_values_tell_nothing() -> None:
    rows = values(3)
    rows[2:] = 0
    rows[2:, 5] = 0.7
    assert unlikely(rows) is None
    assert unlikely((1e-6 * values(3)).half()) is None  # subnormal


def report_of(rule: Aggregator, matrix: WorkerMatrix, num_byzantine: int, quarantine: Quarantine) -> Report:
    reports: list[Report] = []
    observers = Observers()
    observers.add(reports.append)
    robust = RobustAggregation(rule, num_byzantine, quarantine, observers)
    robust.aggregate(matrix)
    robust.announce()
    return reports[0]


@pytest.mark.parametrize("rule", [Mean(), CoordinateWiseMedian(), Krum(), CTMA(CoordinateWiseMedian())], ids=str)
@pytest.mark.parametrize("dropped", [None, 1])
def test_every_rule_reports_it_when_asked(rule: Aggregator, dropped: int | None) -> None:
    rows = values(2)
    rows[3] = rows[3].view(torch.int32).bitwise_xor(1 << 22).view(torch.float32)
    f = 0 if isinstance(rule, Mean) else 2
    if dropped is not None and f > 0:
        rows[dropped, 7] = torch.inf
    matrix = WorkerMatrix([rows[:, :100], rows[:, 100:]])
    assert rule.decide(matrix, f).report().unlikely is None
    found = report_of(rule, matrix, f, Quarantine()).unlikely
    assert found is not None and found.nonzero().flatten().tolist() == [3]
    quarantine = Quarantine()
    quarantine.add([0], rule, 5, f)
    found = report_of(rule, WorkerMatrix([rows]), f, quarantine).unlikely
    assert found is not None and found.tolist() == [False, False, False, True, False]
