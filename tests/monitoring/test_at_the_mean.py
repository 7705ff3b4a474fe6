from dataclasses import replace

import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st
from torch import Tensor

from lightning_byzantine.aggregators import CoordinateWiseMedian, GeometricMedian, PersistentFilter
from lightning_byzantine.aggregators.report import Report
from lightning_byzantine.matrix import Segments, WorkerMatrix
from lightning_byzantine.monitoring.at_the_mean import AtTheMean, at_the_mean


def found(rows: Tensor, f: int) -> list[int]:
    (only_part,) = at_the_mean((rows @ rows.T)[None], f)
    return only_part.nonzero().flatten().tolist()


def noise(m: int, columns: int = 200, seed: int = 1) -> Tensor:
    return torch.randn(m, columns, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@given(
    m=st.integers(4, 8), f=st.integers(0, 3), off=st.floats(0, 0.2), columns=st.integers(2, 9), seed=st.integers(0, 9)
)
def test_follows_the_formula(m: int, f: int, off: float, columns: int, seed: int) -> None:
    rows = noise(m, columns, seed)
    rows[0] = rows[1:].mean(0) + off * rows[0]
    about_mean = rows - rows.mean(0)
    squares = about_mean.square().sum(1)
    usual = float(squares.mean())
    bounds = (0.05 / m * usual, 0.25 * usual)
    assume(all(abs(float(square) / bound - 1) > 1e-6 for square in squares for bound in bounds))
    near = [worker for worker in range(m) if squares[worker] < bounds[0]]
    far = [worker for worker in range(m) if squares[worker] >= bounds[1]]
    on_one_side = any(about_mean[one] @ about_mean[other] > 0 for one in far for other in far if one != other)
    can_tell = len(near) <= f and len(far) >= 3 and len(near) + len(far) == m and not on_one_side
    assert found(rows, f) == (near if can_tell else [])


@pytest.mark.parametrize(("m", "f"), [(4, 1), (5, 2), (8, 3), (17, 8)])
def test_all_who_send_the_mean_of_the_others_are_found(m: int, f: int) -> None:
    rows = noise(m, columns=20000)
    for liars in ([1], list(range(1, f + 1))):
        sent = rows.clone()
        honest = [worker for worker in range(m) if worker not in liars]
        sent[liars] = rows[honest].mean(0)
        assert found(sent, f) == liars


def test_with_a_row_that_is_the_mean_of_two_others_any_of_three_may_be_right() -> None:
    rows = noise(3)
    rows[0] = rows[1:].mean(0)
    assert found(rows, 1) == []


@pytest.mark.parametrize("size", [1.0, 0.5])
@pytest.mark.parametrize(("f", "seed"), [(1, 1), (2, 1), (2, 2), (3, 1), (8, 1)])
def test_nobody_can_be_put_at_the_mean(f: int, seed: int, size: float) -> None:
    honest = noise(f + 2 if f == 1 else f + 1, columns=20000, seed=seed)
    honest[0] *= size
    others = honest[1:]
    for away in (0.0, 1.0, 3.0):
        # Together they make up for the others, and are as far from each other as honest ones, or nearer, or farther.
        liars = away * noise(f, 20000, seed + 100)
        liars += honest[0] - liars.mean(0) - (others - honest[0]).sum(0) / f
        rows = torch.cat([honest, liars])
        assert float((rows.mean(0) - honest[0]).norm()) < 1e-9
        assert found(rows, f) == []


def test_all_honest_workers_but_one_can_not_be_put_at_the_mean() -> None:
    honest = noise(3, columns=20000)
    middle = honest[1:].mean(0)
    for away in (1.0, 10.0, 100.0):
        # A regular triangle about those two, as wide as it takes, but for the third honest worker.
        first = middle + away * (noise(1, 20000, 5) - (honest[0] - middle) / 2)
        rows = torch.cat([honest, first, 3 * middle - honest[:1] - first])
        assert torch.allclose(rows.mean(0), middle)
        assert found(rows, 2) == []


def reports_of(
    steps: int, liars: list[int], lost: dict[int, int] | None = None, rank: int = 100, columns: int = 100
) -> list[Report]:
    """Return what the default rule says of five workers, of which some send the mean in the second of two parameters.

    Args:
        steps: how many.
        liars: who sends the mean.
        lost: the worker whose row is not finite, by step.
        rank: number of the second parameter's columns that are not 0.
        columns: number of all its columns.

    """
    segments, rule, reports = Segments.of_sizes([100, columns]), PersistentFilter(), []
    honest = [worker for worker in range(5) if worker not in liars]
    for step in range(steps):
        rows = noise(5, 100 + columns, seed=step)
        rows[:, 100 + rank :] = 0
        rows[liars, 100:] = rows[honest, 100:].mean(0)
        if lost is not None and step in lost:
            rows[lost[step]] = torch.nan
        reports.append(rule.decide(WorkerMatrix([rows], segments=segments), 2).report())
    return reports


def test_is_found_in_a_single_parameter() -> None:
    watch = AtTheMean(5)
    names = [watch.update(report) for report in reports_of(10, liars=[1, 4])]
    assert names == [[False, True, False, False, True]] * 10


def test_steps_in_which_honest_rows_happen_to_be_on_one_side_are_evened_out() -> None:
    watch = AtTheMean(5)
    reports = reports_of(40, liars=[1, 4], rank=8)
    alone = [AtTheMean(5).update(report)[1] for report in reports]
    averaged = [watch.update(report)[1] for report in reports]
    assert not all(alone[20:]) and all(averaged[20:])


def test_honest_workers_are_never_found() -> None:
    watch = AtTheMean(5)
    assert not any(any(watch.update(report)) for report in reports_of(40, liars=[], rank=2))


def test_a_row_that_is_not_finite_is_left_out() -> None:
    watch = AtTheMean(5)
    lost = {step: 4 for step in range(40) if step % 2}
    names = [watch.update(report) for report in reports_of(40, liars=[1, 4], lost=lost)]
    assert names == [[False, True, False, False, step % 2 == 0] for step in range(40)]


def test_starts_anew_when_other_parameters_take_part() -> None:
    before, after = reports_of(9, liars=[1, 4]), reports_of(9, liars=[1, 4], columns=101)
    watch, fresh = AtTheMean(5), AtTheMean(5)
    for report in before:
        watch.update(report)
    for report in after:
        assert watch.update(report) == fresh.update(report)
        torch.testing.assert_close(watch.state_dict()["averages"], fresh.state_dict()["averages"], rtol=0, atol=0)


def test_goes_on_from_its_state() -> None:
    reports = reports_of(40, liars=[1, 4], rank=8)
    watch, resumed = AtTheMean(5), AtTheMean(5)
    resumed.load_state_dict(watch.state_dict())  # before anything is known
    for report in reports[:10]:
        watch.update(report)
    state = watch.state_dict()
    resumed.load_state_dict(state)
    kept = state["averages"].clone()
    for report in reports[10:]:
        assert resumed.update(report) == watch.update(report)
    torch.testing.assert_close(state["averages"], kept, rtol=0, atol=0)


def test_works_on_whole_rows_where_a_rule_does_not_decide_in_each_parameter() -> None:
    rows = noise(5)
    rows[[1, 4]] = rows[[0, 2, 3]].mean(0)
    report = GeometricMedian().decide(WorkerMatrix([rows]), 2).report()
    assert AtTheMean(5).update(report) == [False, True, False, False, True]
    assert not any(AtTheMean(5).update(replace(report, products=None)))
    assert not any(AtTheMean(5).update(CoordinateWiseMedian().decide(WorkerMatrix([rows]), 2).report()))
