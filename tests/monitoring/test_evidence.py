from collections import deque
from math import isnan
from statistics import median

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lightning_byzantine.aggregators import CoordinateWiseMedian
from lightning_byzantine.aggregators.report import Report
from lightning_byzantine.matrix import WorkerMatrix
from lightning_byzantine.monitoring.evidence import Evidence

NUM_WORKERS = 4


def a_report(seed: int) -> Report:
    """Return one of a step in which some rows can't be measured and some things are not known."""
    generator = torch.Generator().manual_seed(seed)
    maybe = torch.rand(3, NUM_WORKERS, generator=generator) < 0.3
    distances, norms, weights = torch.rand(3, NUM_WORKERS, generator=generator, dtype=torch.float64)
    weights[maybe[0] | maybe[1]] = 0
    norms[maybe[1]] = torch.nan
    if seed % 3 == 0:  # a rule that tells neither, except of rows that it dropped
        weights[~maybe[1]], distances[:] = torch.nan, torch.nan
    outvoted, equivocated = maybe[0] if seed % 2 == 0 else None, maybe[2] if seed % 7 == 0 else None
    return Report(~maybe[1], norms, weights, distances, True, outvoted=outvoted, equivocated=equivocated)


def counted(reports: list[Report], worker: int) -> dict[str, float | None]:
    """Return the evidence, by the slow way."""

    def middle(name: str) -> float | None:
        found = []
        for report in reports:
            values = getattr(report, name).tolist()
            known = [value for value in values if not isnan(value)]
            if known and not isnan(values[worker]):
                found.append(values[worker] / median(known))
        return median(found) if found else None

    told = [report for report in reports if report.weights.nansum() > 0]
    votes = [report.outvoted for report in reports if report.outvoted is not None]
    return {
        "steps": len(reports),
        "trimmed": sum(bool(report.trimmed[worker]) for report in told) if told else None,
        "non_finite": sum(not bool(report.measurable[worker]) for report in reports),
        "distance": middle("distances"),
        "norm": middle("norms"),
        "opposed": sum(bool(report.opposed[worker]) for report in reports),
        "outvoted": sum(bool(out[worker]) for out in votes),
        "equivocated": sum(bool(report.equivocated[worker]) for report in reports if report.equivocated is not None),
    }


@given(seeds=st.lists(st.integers(0, 1000), min_size=1, max_size=20), window=st.integers(1, 20))
def test_says_of_the_window_what_a_loop_counts(seeds: list[int], window: int) -> None:
    evidence, last = Evidence(NUM_WORKERS, window), deque[Report](maxlen=window)
    for seed in seeds:
        last.append(a_report(seed))
        evidence.update(last[-1])
    for worker, part in enumerate(evidence.trimmed_part()):
        expected = counted(list(last), worker)
        assert evidence.of(worker) == pytest.approx(expected)
        trimmed = expected["trimmed"]
        assert isnan(part) if trimmed is None else part == pytest.approx(trimmed / len(last))
    assert evidence.steps == len(seeds)
    assert evidence.non_finite == [
        sum(not bool(a_report(seed).measurable[worker]) for seed in seeds) for worker in range(NUM_WORKERS)
    ]


@pytest.mark.parametrize(("before", "after"), [(10, 10), (10, 4), (4, 10)])
def test_goes_on_from_its_state_with_any_window(before: int, after: int) -> None:
    first, second, reports = Evidence(NUM_WORKERS, before), Evidence(NUM_WORKERS, after), list(map(a_report, range(15)))
    for report in reports[:12]:
        first.update(report)
    second.load_state_dict(first.state_dict())
    for report in reports[12:]:
        second.update(report)
    remembered = min(after, min(before, 12) + 3)
    assert second.steps == 15
    for worker in range(NUM_WORKERS):
        assert second.of(worker) == pytest.approx(counted(reports[15 - remembered :], worker))


def test_refuses_the_state_of_other_workers() -> None:
    evidence = Evidence(NUM_WORKERS, window=5)
    with pytest.raises(ValueError, match="the state is of 3 workers, got num_workers=4"):
        evidence.load_state_dict(Evidence(3, window=5).state_dict())


def test_refuses_a_state_of_other_evidence_and_stays_as_it_was() -> None:
    evidence, other = Evidence(NUM_WORKERS, window=5), Evidence(NUM_WORKERS, window=5)
    for seed in range(3):
        evidence.update(a_report(seed))
    state = other.state_dict()
    del state["last"]["outvoted"]
    with pytest.raises(KeyError, match="outvoted"):
        evidence.load_state_dict(state)
    assert evidence.steps == evidence.of(0)["steps"] == 3


def test_a_row_that_was_dropped_once_is_not_trimmed_by_a_rule_that_trims_nobody() -> None:
    evidence, rows = Evidence(NUM_WORKERS, window=100), torch.randn(NUM_WORKERS, 9)
    for step in range(50):
        rows[2, 0] = torch.nan if step == 0 else 1.0
        evidence.update(CoordinateWiseMedian().decide(WorkerMatrix([rows]), 1).report())
    assert all(map(isnan, evidence.trimmed_part()))
    assert evidence.of(2)["trimmed"] is None and evidence.of(2)["non_finite"] == 1
