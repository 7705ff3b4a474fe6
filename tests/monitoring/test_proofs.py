from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lightning_byzantine.aggregators.report import Report
from lightning_byzantine.monitoring import Suspect
from lightning_byzantine.monitoring.proofs import Proofs

M = 5


def report_of(*not_finite: int, equivocated: tuple[int, ...] = (), outvoted: tuple[int, ...] = ()) -> Report:
    report, flags = Report.of_breakdown(not_finite, M), torch.zeros(2, M, dtype=torch.bool)
    for row, workers in zip(flags, (equivocated, outvoted), strict=True):
        row[list(workers)] = True
    return replace(report, equivocated=flags[0] if equivocated else None, outvoted=flags[1] if outvoted else None)


def proofs_of(reports: list[Report]) -> dict[int, str]:
    proofs = Proofs(M, threshold=13.0)
    for report in reports:
        proofs.update(report)
    return dict(proofs.proofs)


@given(history=st.lists(st.sets(st.integers(0, M - 1)), max_size=40))
def test_rows_that_are_not_finite_are_a_proof_if_they_persist_while_most_are(history: list[set[int]]) -> None:
    expected = set()
    for worker in range(M):
        total = 0
        for step in history:
            if len(step) <= 2:
                total = total + 2 if worker in step else max(0, total - 1)
            if total >= 13:
                expected.add(worker)
    assert proofs_of([report_of(*step) for step in history]) == dict.fromkeys(expected, "not finite")


def test_one_bad_step_is_no_proof_and_neither_is_what_a_metric_says() -> None:
    assert proofs_of([report_of(1)] + [report_of()] * 50) == {}
    assert proofs_of([report_of(outvoted=(2,))] * 50) == {}


def test_rows_that_may_overflow_are_no_proof() -> None:
    proofs = Proofs(M, threshold=13.0)
    assert not any(proofs.update(report_of(1), overflows=True) for _ in range(50))


def test_who_told_ranks_different_things_once_is_proved_to_be_faulty() -> None:
    assert proofs_of([report_of(equivocated=(3,)), report_of()]) == {3: "told ranks different things"}


def test_a_proof_is_new_once_and_stays() -> None:
    proofs = Proofs(M, threshold=3.0)
    assert [proofs.update(report_of(4)) for _ in range(3)] == [[], [4], []]
    assert proofs.update(report_of(equivocated=(4, 0))) == [0]
    assert not proofs.audited(4, "computes wrongly")
    assert proofs.proofs == {0: "told ranks different things", 4: "not finite"}
    for _ in range(50):
        assert proofs.update(report_of()) == []
    assert proofs.proofs.keys() == {0, 4}


@pytest.mark.parametrize("outcome", ["computes rightly", "inconclusive"])
def test_only_a_lost_audit_is_a_proof(outcome: str) -> None:
    proofs = Proofs(M, threshold=13.0)
    assert not proofs.audited(2, outcome) and proofs.proofs == {}
    assert proofs.audited(2, "computes wrongly") and proofs.proofs == {2: "computes wrongly"}
    assert (proofs.verdicts, proofs.num_audits) == ({2: "computes wrongly"}, [0, 0, 2, 0, 0])
    with pytest.raises(ValueError, match="outcome must be one of computes wrongly, computes rightly, inconclusive"):
        proofs.audited(2, "guilty")


def test_goes_on_from_its_state() -> None:
    first, second = Proofs(M, threshold=13.0), Proofs(M, threshold=13.0)
    for _ in range(6):
        first.update(report_of(1))
    first.audited(3, "computes rightly")
    second.load_state_dict(first.state_dict())
    assert second.update(report_of(1)) == [1]
    assert second.state_dict()["verdicts"] == {3: "computes rightly"}
    with pytest.raises(ValueError, match="the state is of 5 workers, got num_workers=3"):
        Proofs(3, threshold=13.0).load_state_dict(first.state_dict())


def test_a_suspect_says_what_is_proved() -> None:
    suspect = Suspect(3, 3, "node7", "cpu", 9, 0.0, 0, None, None, 0, 0, shadow=False)
    here = "worker 3 (rank 3, host node7, cpu): "
    assert str(replace(suspect, proof="computes wrongly", verdict="computes wrongly")) == (
        f"{here}proved: computes wrongly, trimmed in 0 of the last 9 steps"
    )
    assert str(replace(suspect, verdict="computes rightly")) == (
        f"{here}audit: computes rightly, trimmed in 0 of the last 9 steps"
    )
    twice = replace(suspect, proof="told ranks different things", equivocated=2)
    assert str(twice).endswith(
        "proved: told ranks different things, trimmed in 0 of the last 9 steps, told ranks different things in 2 of the"
        " last 9 steps"
    )
    assert twice.as_dict()["proof"] == "told ranks different things"
