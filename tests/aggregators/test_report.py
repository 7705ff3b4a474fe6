"""Reports of rules that decide in each parameter, against the same computed from the rows themselves."""

from dataclasses import replace
from math import isnan, nan

import pytest
import torch
from cases import name_of
from torch import Tensor

from lightning_byzantine.aggregators import (
    CTMA,
    NNM,
    Aggregator,
    CoordinateWiseMedian,
    GeometricMedian,
    Krum,
    PerLayer,
    PersistentFilter,
    Report,
)
from lightning_byzantine.matrix import Segments, WorkerMatrix

SIZES = [110, 20, 240, 130]
# The second is too small to be looked at alone.
GROUPS = [slice(0, 130), slice(130, 370), slice(370, 500)]
RULES: list[Aggregator] = [
    PersistentFilter(),
    PerLayer(NNM(GeometricMedian())),
    PerLayer(Krum()),
    PerLayer(CTMA(Krum())),
]


def drawn(seed: int, m: int = 7) -> Tensor:
    """Return rows about a common mean; of some, one group of columns is far off."""
    generator = torch.Generator().manual_seed(seed)
    rows = torch.randn(m, 500, generator=generator) + torch.randn(500, generator=generator)
    rows[1, GROUPS[1]] *= -9
    rows[2] *= -1
    return rows


def report_of(rule: Aggregator, rows: Tensor, f: int = 3) -> Report:
    rule.reset()
    blocks = [rows[:, :200], rows[:, 200:]]
    segments = Segments.of_blocks(
        dict(zip("abcd", SIZES, strict=True)), [(("a", "b", "c"), (110, 20, 70)), (("c", "d"), (170, 130))]
    )
    return rule.decide(WorkerMatrix(blocks, segments=segments), f).report()


def others_of(worker: int, rows: Tensor, report: Report) -> list[tuple[Tensor, Tensor, float]]:
    """Return for each group the row, the sum of what the others contribute, and their weight."""
    groups = []
    for columns, part in zip(GROUPS, report.parts, strict=True):
        weights = part.weights.clone()
        weights[worker] = 0
        seen = rows.double().nan_to_num()[:, columns]
        groups.append((seen[worker], weights @ seen, float(weights.sum())))
    return groups


every_rule = pytest.mark.parametrize("rule", RULES, ids=name_of)


@every_rule
@pytest.mark.parametrize("bad", [None, 4])
def test_deviations_are_distances_from_what_the_others_make_of_each_group(rule: Aggregator, bad: int | None) -> None:
    rows = drawn(seed=1)
    if bad is not None:
        rows[bad, 7] = torch.nan
    report = report_of(rule, rows)
    apart = torch.full((len(GROUPS), 7), nan, dtype=torch.float64)
    for worker in range(7):
        for group, (row, others, weight) in enumerate(others_of(worker, rows, report)):
            if worker != bad and weight > 1e-9:
                apart[group, worker] = (row - others / weight).norm()
    for worker, deviation in enumerate(report.deviations.tolist()):
        # Where a row alone is the aggregate, it counts as the lower median of the others.
        squared = [row.nanmedian() if isnan(row[worker]) else row[worker] for row in apart]
        if worker == bad:
            assert isnan(deviation)
        else:
            assert deviation == pytest.approx(float(torch.stack(squared).norm()), rel=1e-4)


@every_rule
@pytest.mark.parametrize("bad", [None, 4])
def test_alignments_are_those_with_what_the_others_make_of_the_aggregate(rule: Aggregator, bad: int | None) -> None:
    rows = drawn(seed=2)
    if bad is not None:
        rows[bad, 7] = torch.nan
    report = report_of(rule, rows)
    for worker, alignment in enumerate(report.alignments.tolist()):
        row, others = (torch.cat(parts) for parts in list(zip(*others_of(worker, rows, report), strict=True))[:2])
        if worker == bad or not others.any():
            assert isnan(alignment)
        else:
            assert alignment == pytest.approx(float(torch.cosine_similarity(row, others, dim=0)), abs=1e-4)
    assert report.alignments[2] < -0.3
    common = float(report.alignments.nanmedian())
    assert bool(report.opposed[2]) == (common >= 0.5)


@every_rule
def test_says_of_the_whole_what_the_groups_add_up_to(rule: Aggregator) -> None:
    rows = drawn(seed=3)
    rows[4, 7] = torch.inf
    report = report_of(rule, rows)
    shares = torch.tensor([part.share for part in report.parts], dtype=torch.float64)
    torch.testing.assert_close(shares, torch.tensor([0.26, 0.48, 0.26], dtype=torch.float64))
    seen = [0, 1, 2, 3, 5, 6]
    whole = torch.zeros(7, 500, dtype=torch.float64)
    for columns, part in zip(GROUPS, report.parts, strict=True):
        aggregate = part.weights[seen] @ rows[seen].double()[:, columns]
        whole[:, columns] = rows[:, columns].double() - aggregate
        torch.testing.assert_close(part.norms[seen], rows[seen][:, columns].double().norm(dim=1), rtol=1e-5, atol=0)
        torch.testing.assert_close(part.distances[seen], whole[seen][:, columns].norm(dim=1), rtol=1e-4, atol=1e-3)
        assert part.norms[4].isnan() and part.distances[4].isnan() and part.weights[4] == 0
    torch.testing.assert_close(report.distances[seen], whole[seen].norm(dim=1), rtol=1e-4, atol=1e-3)
    torch.testing.assert_close(report.weights, shares @ torch.stack([part.weights for part in report.parts]))
    assert report.products is not None
    torch.testing.assert_close(report.products[seen][:, seen], whole[seen] @ whole[seen].T, rtol=1e-4, atol=1e-2)
    out = torch.stack([(part.weights < 0.05 / 7).double() for part in report.parts])
    torch.testing.assert_close(report.left_out, shares @ out)
    assert report.left_out[4] == 1


def test_a_worker_that_lies_in_one_group_is_left_out_of_its_columns() -> None:
    rows, rule = drawn(seed=4), PersistentFilter()
    rows[2] *= -1  # honest again
    for _ in range(10):
        report = report_of(rule, rows, f=1)
    torch.testing.assert_close(report.left_out, torch.tensor([0, 0.48, 0, 0, 0, 0, 0], dtype=torch.float64))
    assert not report.trimmed.any()
    assert int(report.deviations.argmax()) == 1


@pytest.mark.parametrize(
    "rule", [PerLayer(CoordinateWiseMedian()), PerLayer(CTMA(CoordinateWiseMedian()))], ids=name_of
)
def test_without_inner_products_nothing_is_read_for_the_groups(rule: Aggregator) -> None:
    rows = drawn(seed=5)
    segments = Segments.of_sizes(SIZES)
    sums = []

    def complete(total: Tensor) -> Tensor:
        sums.append(total)
        return total

    decision = rule.decide(WorkerMatrix([rows], complete, segments=segments), 3)
    expected = rows.double().norm(dim=1)
    rows.fill_(torch.nan)
    before = len(sums)
    report = decision.report()
    assert len(sums) == before and report.parts == ()
    assert report.deviations.isnan().all() and report.alignments.isnan().all()
    torch.testing.assert_close(report.norms, expected, rtol=1e-5, atol=0)


@every_rule
def test_a_report_on_groups_reads_no_column(rule: Aggregator) -> None:
    rows = drawn(seed=6)
    rule.reset()
    decision = rule.decide(WorkerMatrix([rows], segments=Segments.of_sizes(SIZES)), 3)
    rows.fill_(torch.nan)
    report = decision.report()
    assert report.distances.isfinite().all() and len(report.parts) == len(GROUPS)
    assert report.certificate() is not None


def test_a_report_among_more_workers_keeps_what_it_says_of_each() -> None:
    report = report_of(PersistentFilter(), drawn(seed=7), f=2)
    wider = report.among(torch.tensor([0, 1, 2, 4, 5, 6, 8]), num_workers=9, measurable=True)
    kept = [0, 1, 2, 4, 5, 6, 8]
    for statistic in ("deviations", "alignments", "left_out", "norms", "weights"):
        torch.testing.assert_close(getattr(wider, statistic)[kept], getattr(report, statistic))
    assert wider.deviations[[3, 7]].isnan().all() and wider.left_out[[3, 7]].tolist() == [1, 1]
    assert wider.certificate() == pytest.approx(report.certificate())
    assert wider.certificate(liars=[8]) == pytest.approx(report.certificate(liars=[6]))
    assert wider.certificate(liars=[3]) == wider.certificate()  # not there anyway


def test_a_row_that_is_the_aggregate_in_every_group_has_no_deviation() -> None:
    whole = report_of(PerLayer(Krum()), drawn(seed=8))
    alone = torch.eye(7, dtype=torch.float64)[0]
    parts = tuple(replace(part, weights=alone, distances=1 - alone) for part in whole.parts)
    deviations = replace(whole, parts=parts).deviations
    assert deviations[0].isnan() and not deviations[1:].isnan().any()
