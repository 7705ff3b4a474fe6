from collections.abc import Iterator
from dataclasses import replace
from functools import cache

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from lightning_byzantine.aggregators import (
    ARC,
    CTMA,
    NNM,
    Aggregator,
    Clipping,
    CoordinateWiseMedian,
    GeometricMedian,
    Krum,
    Mean,
    PersistentFilter,
)
from lightning_byzantine.aggregators.report import Report
from lightning_byzantine.attacks import OneLayer
from lightning_byzantine.matrix import Segments, WorkerMatrix
from lightning_byzantine.monitoring.audit_order import audit_order
from lightning_byzantine.monitoring.crowding import Crowding
from lightning_byzantine.monitoring.suspicion import Suspicion

BETA = 0.9


@pytest.fixture(autouse=True, scope="module")
def one_thread() -> Iterator[None]:
    """More threads take ten times as long for such small tensors where others use the cores as well."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@cache
def reports_of(
    seed: int, steps: int, fault: str = "none", bad: tuple[int, ...] = (), columns: int = 200
) -> list[Report]:
    """Return what the default rule says of 8 workers' momentum: heavy-tailed noise about a common gradient."""
    generator = torch.Generator().manual_seed(seed)
    rule, momentum = PersistentFilter(), torch.zeros(8, columns, dtype=torch.float64)
    segments = Segments.of_sizes([columns // 2, columns - columns // 2])
    common = 0.6 * torch.randn(columns, generator=generator, dtype=torch.float64)
    reports = []
    for _ in range(steps):
        sizes = torch.randn(8, 1, generator=generator, dtype=torch.float64).mul(0.5).exp()
        gradients = common + sizes * torch.randn(8, columns, generator=generator, dtype=torch.float64)
        momentum = BETA * momentum + (1 - BETA) * gradients
        sent = momentum.clone()
        for worker in bad:
            sent[worker] = tampered(sent[worker], fault)
        reports.append(rule.decide(WorkerMatrix([sent], segments=segments), 3).report())
    return reports


def tampered(row: Tensor, fault: str) -> Tensor:
    factors = {"nan": torch.nan, "inf": torch.inf, "zero": 0.0, "x10": 10.0, "sign flip": -1.0}
    return row * factors[fault]


def suspected(reports: list[Report], order: Tensor | None = None, scale: float = 1.0) -> list[list[int]]:
    suspicion, found = Suspicion(8), []
    order = torch.arange(8) if order is None else order
    for report in reports:
        suspicion.update(shuffled(report, order, scale), BETA)
        found.append(sorted(suspicion.suspected))
    return found


def shuffled(report: Report, order: Tensor, scale: float) -> Report:
    return replace(
        report,
        measurable=report.measurable[order],
        norms=scale * report.norms[order],
        weights=report.weights[order],
        distances=scale * report.distances[order],
        parts=tuple(shuffled(part, order, scale) for part in report.parts),
    )


@pytest.mark.parametrize("bad", [(3,), (0, 7)])
@pytest.mark.parametrize("fault", ["nan", "inf", "zero", "x10", "sign flip"])
def test_a_persistent_fault_is_named_within_30_steps(fault: str, bad: tuple[int, ...]) -> None:
    assert suspected(reports_of(1, 30, fault, bad))[-1] == list(bad)


@pytest.mark.parametrize("seed", [1, 2])
def test_nobody_is_suspected_by_chance(seed: int) -> None:
    assert not any(suspected(reports_of(seed, 300)))


@given(order=st.permutations(range(8)), scale=st.floats(1e-20, 1e20))
def test_order_and_scale_of_workers_do_not_matter(order: list[int], scale: float) -> None:
    reports = reports_of(3, 12, "x10", (2,), columns=20)
    plain = suspected(reports)
    assert plain[-1] == [2]
    moved = suspected(reports, torch.tensor(order), scale)
    assert [[order[worker] for worker in step] for step in moved] == plain


@pytest.mark.parametrize("norm", [torch.nan, torch.inf, 1e30])
@pytest.mark.parametrize("memory", [0.0, BETA])
def test_good_steps_in_between_do_not_clear_one_that_is_not_finite(norm: float, memory: float) -> None:
    suspicion, unknown = Suspicion(8), torch.full((8,), torch.nan, dtype=torch.float64)
    for step in range(60):
        measurable, norms = torch.ones(8, dtype=torch.bool), torch.ones(8, dtype=torch.float64)
        if step % 2 == 0:
            measurable[3], norms[3] = False, norm
        suspicion.update(Report(measurable, norms, unknown, unknown, from_aggregate=False), memory)
    assert sorted(suspicion.suspected) == [3]


def reports_of_shrinking(bad: tuple[int, ...]) -> list[Report]:
    """Return what the rule says of 8 workers who follow a shrinking gradient without a lag, as double momentum does."""
    generator, rule = torch.Generator().manual_seed(4), CTMA(NNM(CoordinateWiseMedian()))
    common, noise = torch.randn(200, generator=generator, dtype=torch.float64), torch.zeros(8, 200).double()
    reports = []
    for step in range(30):
        scale = 0.9**step
        noise = BETA * noise + 3 * (1 - BETA) * scale * torch.randn(8, 200, generator=generator, dtype=torch.float64)
        sent = scale * common + noise
        sent[list(bad)] *= -1
        reports.append(rule.decide(WorkerMatrix([sent]), 3).report())
    return reports


@pytest.mark.parametrize("bad", [(3,), (0, 7)])
def test_a_flipped_sign_is_named_by_its_direction_where_distances_hide_it(bad: tuple[int, ...]) -> None:
    reports = reports_of_shrinking(bad)
    assert suspected(reports)[9] == list(bad)
    assert not any(suspected([replace(report, from_aggregate=False) for report in reports]))


def report_of_alignments(alignments: list[float]) -> Report:
    """Return one on rows of length 1, each of which has these cosines with an aggregate that it has no part in."""
    norms, weights = torch.ones(len(alignments), dtype=torch.float64), torch.zeros(len(alignments)).double()
    weights[:2] = 0.5  # of rows that are the aggregate themselves
    distances = (2 - 2 * torch.tensor(alignments, dtype=torch.float64)).sqrt()
    return Report(norms.bool(), norms, weights, distances, from_aggregate=True)


@pytest.mark.parametrize(
    ("common", "other", "opposed"),
    [(0.9, -0.5, True), (0.9, -0.4, False), (0.51, -0.3, True), (0.49, -0.9, False), (0.9, torch.nan, False)],
)
def test_only_those_who_clearly_point_away_from_what_is_clearly_common_are_opposed(
    common: float, other: float, opposed: bool
) -> None:
    report = report_of_alignments([1.0, 1.0, common, common, common, common, other])
    torch.testing.assert_close(report.alignments[2:], torch.tensor([common] * 4 + [other]).double(), equal_nan=True)
    assert report.opposed.tolist() == [False] * 6 + [opposed]


def test_whoever_is_bad_in_every_step_stays_suspected_while_there_are_too_many() -> None:
    suspicion = Suspicion(5)
    for _ in range(300):
        suspicion.update(Report.of_breakdown([1, 2, 3], 5), BETA)
    assert suspicion.suspected == {1, 2, 3}


@pytest.mark.parametrize("fault", ["nan", "x10", "sign flip"])
def test_goes_on_from_its_state(fault: str) -> None:
    reports = reports_of(6, 20, fault, (2,))
    whole, first, second = Suspicion(8), Suspicion(8), Suspicion(8)
    for step, report in enumerate(reports):
        watched = replace(report, outvoted=torch.arange(8) == 5)
        whole.update(watched, BETA)
        (first if step < 4 else second).update(watched, BETA)
        if step == 3:
            second.load_state_dict(first.state_dict())
    assert whole.suspected == {2, 5}
    assert second.state_dict() == whole.state_dict()


def test_refuses_the_state_of_other_workers_and_stays_as_it_was() -> None:
    suspicion, other = Suspicion(8), Suspicion(5)
    for report in reports_of(1, 12, "x10", (3,)):
        suspicion.update(report, BETA)
    before = suspicion.state_dict()
    with pytest.raises(ValueError, match="the state is of 5 workers, got num_workers=8"):
        suspicion.load_state_dict(other.state_dict())
    assert suspicion.state_dict() == before


def test_identical_rows_are_nobodys_fault() -> None:
    ones = torch.ones(8, dtype=torch.float64)
    for norms, distances in ((ones, 0 * ones), (0 * ones, 0 * ones), (ones, ones)):
        report = Report(torch.ones(8, dtype=torch.bool), norms, ones / 8, distances, from_aggregate=True)
        assert not any(suspected([report] * 60))


def test_what_nobody_knows_is_no_evidence() -> None:
    unknown = torch.full((8,), torch.nan, dtype=torch.float64)
    report = Report(torch.ones(8, dtype=torch.bool), unknown, unknown, unknown, from_aggregate=False)
    assert not any(suspected([report] * 60))
    suspicion = Suspicion(8)
    suspicion.update(report, BETA)
    assert suspicion.scores == [0.0] * 8


RULES: list[tuple[Aggregator, bool]] = [
    (CTMA(NNM(CoordinateWiseMedian())), True),
    (CTMA(CoordinateWiseMedian()), False),
    (NNM(CTMA(CoordinateWiseMedian())), True),
    (Krum(), True),
    (GeometricMedian(), True),
    (ARC(GeometricMedian()), True),
    (Clipping(GeometricMedian(), max_norm=2.0), True),
]


@pytest.mark.parametrize("bad", [None, 2])
@pytest.mark.parametrize(("rule", "from_aggregate"), RULES, ids=str)
def test_a_report_says_what_a_loop_would(rule: Aggregator, from_aggregate: bool, bad: int | None) -> None:
    rows = torch.randn(7, 40, generator=torch.Generator().manual_seed(5))
    if bad is not None:
        rows[bad, 3] = torch.nan
    decision = rule.decide(WorkerMatrix([rows[:, :11], rows[:, 11:]]), 3)
    result, report = torch.cat(decision.values()).double(), decision.report()
    if not from_aggregate:
        seen = rows[[worker for worker in range(7) if worker != bad]]
        result = CoordinateWiseMedian()(seen, num_byzantine=2).double()
    assert report.from_aggregate == from_aggregate
    for worker in range(7):
        row = rows[worker].double()
        assert bool(report.measurable[worker]) == (worker != bad)
        assert bool(report.trimmed[worker]) == (float(report.weights[worker]) < 0.05 / 7 or worker == bad)
        if worker != bad:
            assert float(report.norms[worker]) == pytest.approx(float(row.norm()), rel=1e-5)
            assert float(report.distances[worker]) == pytest.approx(float((row - result).norm()), rel=1e-4, abs=1e-3)
    if from_aggregate:
        total = sum(float(w) * row.nan_to_num().double() for w, row in zip(report.weights, rows, strict=True))
        torch.testing.assert_close(total, result, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("bad", [None, 2])
@pytest.mark.parametrize(("rule", "from_aggregate"), RULES, ids=str)
def test_alignments_are_those_with_what_the_others_make_of_the_aggregate(
    rule: Aggregator, from_aggregate: bool, bad: int | None
) -> None:
    generator = torch.Generator().manual_seed(7)
    rows = torch.randn(40, generator=generator) + torch.randn(7, 40, generator=generator)
    rows[5] *= -1
    if bad is not None:
        rows[bad, 3] = torch.inf
    report = rule.decide(WorkerMatrix([rows]), 3).report()
    if not from_aggregate:
        assert report.alignments.isnan().all()
        return
    for worker in range(7):
        others = torch.zeros(40, dtype=torch.float64)
        for other, weight in enumerate(report.weights.tolist()):
            if other != worker and weight != 0:
                others += weight * rows[other].double()
        expected = torch.nn.functional.cosine_similarity(rows[worker].double(), others, dim=0)
        if worker == bad or float(others.norm()) == 0:
            assert report.alignments[worker].isnan()
        else:
            torch.testing.assert_close(report.alignments[worker], expected, rtol=0, atol=1e-4)
    assert float(report.alignments[5]) < -0.3


@pytest.mark.parametrize("size", [0.0, 1e-90, 1e-30, 1e30, 1e90])
def test_alignments_of_rows_far_off_are_cosines_or_unknown(size: float) -> None:
    rows = torch.randn(7, 40, generator=torch.Generator().manual_seed(8), dtype=torch.float64)
    rows[1] *= size
    alignments = CTMA(NNM(CoordinateWiseMedian())).decide(WorkerMatrix([rows]), 2).report().alignments
    assert bool((alignments.isnan() | (alignments.abs() <= 1.001)).all())
    assert not alignments[[0, 2, 3, 4, 5, 6]].isnan().any()


@pytest.mark.parametrize("size", [1e-90, 1e-30, 1e30, 1e90])
def test_alignments_do_not_depend_on_the_scale(size: float) -> None:
    rows = torch.randn(7, 40, generator=torch.Generator().manual_seed(8), dtype=torch.float64)
    plain, scaled = (
        CTMA(NNM(CoordinateWiseMedian())).decide(WorkerMatrix([x]), 2).report() for x in (rows, size * rows)
    )
    torch.testing.assert_close(scaled.alignments, plain.alignments)


def test_what_is_but_rounding_is_no_alignment() -> None:
    report = report_of_alignments([1.0, 1.0, 0.8, 1e30])
    report.norms[3], report.distances[3] = 1e30, 1e30 * (1 + 1e-15)
    assert report.alignments[3].isnan() and report.alignments[2] == pytest.approx(0.8)


def test_rules_without_distances_say_so() -> None:
    rows = torch.randn(5, 9)
    for rule in (Mean(), CoordinateWiseMedian()):
        report = rule.decide(WorkerMatrix([rows]), 1).report()
        assert report.distances.isnan().all()
        torch.testing.assert_close(report.norms, rows.double().norm(dim=1), rtol=1e-5, atol=0)
        assert not report.trimmed.any()


@pytest.mark.parametrize("rule", [rule for rule, _ in RULES], ids=str)
def test_a_report_reads_no_column(rule: Aggregator) -> None:
    rows = torch.randn(5, 9)
    decision = rule.decide(WorkerMatrix([rows]), 1)
    rows.fill_(torch.nan)
    assert decision.report().distances.isfinite().all()
    assert all(values.isnan().all() for values in decision.values())  # as whatever reads them now


def reports_of_framing(m: int, steps: int) -> list[Report]:
    """Return what the default rule says where f liars send the row of worker 0 with 5% noise, from the first step."""
    generator = torch.Generator().manual_seed(9)
    rule, momentum = PersistentFilter(), torch.zeros(m, 300, dtype=torch.float64)
    segments, f, reports = Segments.of_sizes([100, 200]), (m - 1) // 2, []
    common = 0.3 * torch.randn(300, generator=generator, dtype=torch.float64)
    for _ in range(steps):
        gradients = common + torch.randn(m, 300, generator=generator, dtype=torch.float64)
        momentum = BETA * momentum + (1 - BETA) * gradients
        sent, noise = momentum.clone(), torch.randn(f, 300, generator=generator, dtype=torch.float64)
        sent[1 : f + 1] = sent[0] * (1 + 0.05 * noise)
        reports.append(rule.decide(WorkerMatrix([sent], segments=segments), f).report())
    return reports


@pytest.mark.parametrize("m", [5, 9, 17])
def test_a_tight_cluster_of_f_plus_1_makes_nobody_suspect(m: int) -> None:
    suspicion, crowding = Suspicion(m), Crowding(m)
    for report in reports_of_framing(m, 120):
        suspicion.update(report, BETA)
        crowding.update(report)
        assert not suspicion.suspected
    # It is the cluster that an audit looks at first.
    first = audit_order(suspicion.scores, crowding.averages, [0] * m, cleared=[])[: (m + 1) // 2]
    assert set(first) == set(range((m + 1) // 2))


@pytest.mark.parametrize("bad", [(3,), (0, 7), (1, 4, 6)])
def test_as_many_as_leave_two_that_are_no_copies_are_named_at_once(bad: tuple[int, ...]) -> None:
    assert suspected(reports_of(1, 30, "x10", bad))[-1] == list(bad)


def reports_of_five(liars: str, steps: int = 60) -> list[Report]:
    """Return what the default rule says of five workers, of which 1 and 4 send noise or next to nothing.

    In step 30, the gradient of worker 2 is 30 times as long as usual, which momentum keeps for a while.
    """
    generator, rule, momentum = torch.Generator().manual_seed(11), PersistentFilter(), torch.zeros(5, 300).double()
    common, reports = 0.3 * torch.randn(300, generator=generator, dtype=torch.float64), []
    for step in range(steps):
        sizes = torch.randn(5, 1, generator=generator, dtype=torch.float64).mul(0.5).exp()
        sizes[2] *= 30 if step == 30 else 1
        gradients = common + sizes * torch.randn(5, 300, generator=generator, dtype=torch.float64)
        momentum = BETA * momentum + (1 - BETA) * gradients
        sent = momentum.clone()
        noise = torch.randn(2, 300, generator=generator, dtype=torch.float64)
        sent[[1, 4]] = 100 * noise if liars == "loud" else 1e-3 * noise
        reports.append(rule.decide(WorkerMatrix([sent]), 2).report())
    return reports


def test_all_f_workers_that_are_loud_are_named() -> None:
    suspicion = Suspicion(5)
    for report in reports_of_five("loud"):
        suspicion.update(report, BETA)
    assert suspicion.suspected == {1, 4}


def test_f_workers_that_are_silent_make_no_other_loud() -> None:
    suspicion = Suspicion(5)
    for report in reports_of_five("silent"):
        suspicion.update(report, BETA)
        assert suspicion.suspected <= {1, 4}


def reports_of_one_layer(steps: int) -> list[Report]:
    """Return what the default rule says of five workers, of which 1 and 4 attack the last of two parameters."""
    generator, rule, momentum = torch.Generator().manual_seed(12), PersistentFilter(), torch.zeros(5, 300).double()
    segments, reports = Segments.of_sizes([200, 100]), []
    for _ in range(steps):
        gradients = 0.3 + torch.randn(5, 300, generator=generator, dtype=torch.float64)
        momentum = BETA * momentum + (1 - BETA) * gradients
        sent = OneLayer().tamper(WorkerMatrix([momentum.clone()], segments=segments), [1, 4])
        reports.append(rule.decide(sent, 2).report())
    return reports


def test_all_who_attack_one_layer_are_named_by_what_they_send_in_the_others() -> None:
    suspicion, resumed, older, reports = Suspicion(5), Suspicion(5), Suspicion(5), reports_of_one_layer(30)
    for report in reports[:15]:
        suspicion.update(report, BETA)
        assert suspicion.suspected <= {1, 4}
    assert suspicion.suspected == {1, 4}
    state = suspicion.state_dict()
    resumed.load_state_dict(state)
    older.load_state_dict({name: value for name, value in state.items() if name != "at_the_mean"})
    for report in reports[15:]:
        for each in (suspicion, resumed, older):
            each.update(report, BETA)
            assert each.suspected == {1, 4}
    assert resumed.scores == suspicion.scores
    resumed.clear(1)
    assert resumed.suspected == {4}


def test_who_was_cleared_is_suspected_for_other_reasons_only() -> None:
    suspicion, reports = Suspicion(8), reports_of(2, 90, "x10", (3,))
    for report in reports[:30]:
        suspicion.update(report, BETA)
    assert suspicion.suspected == {3}
    suspicion.clear(3)
    resumed = Suspicion(8)
    resumed.load_state_dict(suspicion.state_dict())
    for report in reports[30:]:
        resumed.update(report, BETA)
        assert not resumed.suspected
    for report in reports[:20]:
        resumed.update(replace(report, outvoted=torch.arange(8) == 3), BETA)
    assert resumed.suspected == {3}
    resumed.clear(3)  # once more, which says nothing about what its process reports beside its gradients
    assert resumed.suspected == {3}
    for report in reports[:30]:
        resumed.update(report, BETA)
    assert not resumed.suspected
