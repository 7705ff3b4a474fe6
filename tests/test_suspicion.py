import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from lightning_byzantine.aggregators import CTMA, NNM, Aggregator, CoordinateWiseMedian, GeometricMedian, Krum, Mean
from lightning_byzantine.matrix import WorkerMatrix
from lightning_byzantine.report import Report
from lightning_byzantine.suspicion import Suspicion

BETA = 0.9


def reports_of(
    seed: int, steps: int, fault: str = "none", bad: tuple[int, ...] = (), columns: int = 200
) -> list[Report]:
    """Return what the default rule says of 8 workers' momentum: heavy-tailed noise about a common gradient."""
    generator = torch.Generator().manual_seed(seed)
    rule, momentum = CTMA(NNM(CoordinateWiseMedian())), torch.zeros(8, columns, dtype=torch.float64)
    common = 0.6 * torch.randn(columns, generator=generator, dtype=torch.float64)
    reports = []
    for _ in range(steps):
        sizes = torch.randn(8, 1, generator=generator, dtype=torch.float64).mul(0.5).exp()
        gradients = common + sizes * torch.randn(8, columns, generator=generator, dtype=torch.float64)
        momentum = BETA * momentum + (1 - BETA) * gradients
        sent = momentum.clone()
        for worker in bad:
            sent[worker] = tampered(sent[worker], fault)
        reports.append(rule.decide(WorkerMatrix([sent]), 3).report())
    return reports


def tampered(row: Tensor, fault: str) -> Tensor:
    factors = {"nan": torch.nan, "inf": torch.inf, "zero": 0.0, "x10": 10.0, "sign flip": -1.0}
    return row * factors[fault]


def suspected(reports: list[Report], order: Tensor | None = None, scale: float = 1.0) -> list[list[int]]:
    suspicion, found = Suspicion(8), []
    order = torch.arange(8) if order is None else order
    for report in reports:
        shuffled = Report(
            report.measurable[order],
            scale * report.norms[order],
            report.weights[order],
            scale * report.distances[order],
            report.from_aggregate,
        )
        suspicion.update(shuffled, BETA)
        found.append(sorted(suspicion.suspected))
    return found


@pytest.mark.parametrize("bad", [(3,), (0, 7)])
@pytest.mark.parametrize("fault", ["nan", "inf", "zero", "x10", "sign flip"])
def test_a_persistent_fault_is_named_within_30_steps(fault: str, bad: tuple[int, ...]) -> None:
    assert suspected(reports_of(1, 30, fault, bad))[-1] == list(bad)


@pytest.mark.parametrize("seed", [1, 2])
def test_nobody_is_suspected_by_chance(seed: int) -> None:
    assert not any(suspected(reports_of(seed, 400, columns=50)))


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


@pytest.mark.parametrize("bad", [(3,), (0, 7)])
def test_a_flipped_sign_is_named_while_gradients_shrink_faster_than_momentum_forgets(bad: tuple[int, ...]) -> None:
    generator, rule = torch.Generator().manual_seed(4), CTMA(NNM(CoordinateWiseMedian()))
    common, momentum = torch.randn(200, generator=generator, dtype=torch.float64), torch.zeros(8, 200).double()
    reports = []
    for step in range(30):
        noise = torch.randn(8, 200, generator=generator, dtype=torch.float64)
        momentum = BETA * momentum + (1 - BETA) * 0.8**step * (common + noise)
        sent = momentum.clone()
        sent[list(bad)] *= -1
        reports.append(rule.decide(WorkerMatrix([sent]), 3).report())
    assert suspected(reports)[-1] == list(bad)


def report_of_bits(*unlikely: int) -> Report:
    ones, bits = torch.ones(5, dtype=torch.float64), torch.zeros(5, dtype=torch.bool)
    bits[list(unlikely)] = True
    return Report(ones.bool(), ones, ones / 5, ones, from_aggregate=True, unlikely=bits)


def test_only_bits_that_are_unlikely_twice_in_a_row_count() -> None:
    sometimes, always = Suspicion(5), Suspicion(5)
    nobody_looked = Report(**{**vars(report_of_bits()), "unlikely": None})
    for step in range(60):
        sometimes.update(report_of_bits(1) if step % 2 else report_of_bits(), memory=0.0)
        always.update(nobody_looked if step % 5 else report_of_bits(1), memory=0.0)
    assert sometimes.scores == [0.0] * 5
    assert always.suspected == {1}


@pytest.mark.parametrize("fault", ["nan", "x10", "sign flip"])
def test_goes_on_from_its_state(fault: str) -> None:
    reports = reports_of(6, 20, fault, (2,))
    whole, first, second = Suspicion(8), Suspicion(8), Suspicion(8)
    for step, report in enumerate(reports):
        bits = torch.arange(8) == 5 if step % 3 == 0 else None
        watched = Report(**{**vars(report), "unlikely": bits})
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
        assert bool(report.trimmed[worker]) == (float(report.weights[worker]) == 0 or worker == bad)
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


@pytest.mark.parametrize("size", [0.0, 1e-30, 1e30])
def test_alignments_of_rows_far_off_are_cosines_or_unknown(size: float) -> None:
    rows = torch.randn(7, 40, generator=torch.Generator().manual_seed(8))
    rows[1] *= size
    alignments = CTMA(NNM(CoordinateWiseMedian())).decide(WorkerMatrix([rows]), 2).report().alignments
    assert bool((alignments.isnan() | (alignments.abs() <= 1.001)).all())
    assert not alignments[[0, 2, 3, 4, 5, 6]].isnan().any()


def test_rules_without_distances_say_so() -> None:
    rows = torch.randn(5, 9)
    for rule in (Mean(), CoordinateWiseMedian()):
        report = rule.decide(WorkerMatrix([rows]), 1).report()
        assert report.distances.isnan().all()
        torch.testing.assert_close(report.norms, rows.double().norm(dim=1), rtol=1e-5, atol=0)
        assert not report.trimmed.any()


@pytest.mark.parametrize("rule", [rule for rule, _ in RULES], ids=str)
def test_a_report_reads_no_column(rule: Aggregator, monkeypatch: pytest.MonkeyPatch) -> None:
    decision = rule.decide(WorkerMatrix([torch.randn(5, 9)]), 1)
    monkeypatch.setattr(WorkerMatrix, "_chunks", None)
    monkeypatch.setattr("lightning_byzantine.matrix.quick_products", None)
    assert decision.report().distances.isfinite().all()
