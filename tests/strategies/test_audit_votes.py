"""What follows from auditors' statements, and what ranks accept from each other, whatever liars send."""

from collections import Counter
from math import prod

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from lightning_byzantine.strategies.audits.parcel import (
    MalformedParcelError,
    OtherStructureError,
    _checked,
    _described,
)
from lightning_byzantine.strategies.audits.statement import SKETCH_SIZE, Finding, Statement, judged, sketched
from lightning_byzantine.strategies.audits.verdict import Outcome
from lightning_byzantine.strategies.audits.window import AuditWindow

ANYTHING = st.one_of(
    st.floats(allow_nan=True, allow_infinity=True), st.sampled_from([0.0, 1.0, 2.0, 3.0]), st.integers(-9, 9)
)


@st.composite
def lies(draw: st.DrawFn) -> Statement:
    """Return what an honest rank makes of any bytes, some of which look like a statement."""
    numbers = draw(st.lists(ANYTHING, min_size=5, max_size=5))
    packed = torch.full((5 + SKETCH_SIZE,), float(draw(ANYTHING)), dtype=torch.float64)
    packed[:5] = torch.tensor([float(number) for number in numbers], dtype=torch.float64)
    return Statement.unpacked(packed)


def honest(residual: float, noise: float, seed: int) -> Statement:
    """Return the statement of an auditor whose own gradient, of norm 1, has some noise."""
    generator = torch.Generator().manual_seed(seed)
    sketch = noise * torch.randn(SKETCH_SIZE, generator=generator, dtype=torch.float64) / SKETCH_SIZE**0.5
    sketch[0] += residual
    return Statement(Finding.RECOMPUTED, True, float(sketch.norm()), 1.0, 3e-4, sketch)


@given(st.integers(1, 4).flatmap(lambda f: st.lists(lies(), min_size=f, max_size=f)), st.sampled_from([0.0, 1e-2]))
def test_f_liars_cant_frame_an_honest_worker(liars: list[Statement], noise: float) -> None:
    f = len(liars)
    auditors = [honest(0.0, noise, seed) for seed in range(f)] + liars
    assert judged(dict(enumerate(auditors)), f).outcome != Outcome.WRONGLY


@given(st.integers(1, 4).flatmap(lambda f: st.lists(lies(), min_size=f - 1, max_size=f - 1)), st.booleans())
def test_a_liar_and_its_accomplices_cant_save_themselves(liars: list[Statement], is_noisy: bool) -> None:
    f = len(liars) + 1
    # Where steps don't repeat exactly, a lie must be larger to be one.
    residual, noise = (0.4, 1e-2) if is_noisy else (0.2, 0.0)
    auditors = [honest(residual, noise, seed) for seed in range(f + 1)] + liars
    assert judged(dict(enumerate(auditors)), f).outcome == Outcome.WRONGLY


def test_who_has_seen_no_step_reproduced_proves_nothing() -> None:
    statements = {rank: honest(0.2, 0.0, rank) for rank in range(3)}
    statements[1].has_reproduced = False
    found = judged(statements, num_byzantine=2)
    assert (found.outcome, found.wrong, found.unproved) == (Outcome.INCONCLUSIVE, 2, 1)


def test_two_auditors_that_differ_by_chance_prove_nothing() -> None:
    statements = {rank: honest(0.0, 0.3, rank) for rank in range(4)}
    found = judged(statements, num_byzantine=2)
    assert found.outcome == Outcome.INCONCLUSIVE
    assert "chance" in found.reason


def depending_on_the_rank(state: float) -> Statement:
    """Return the statement of an auditor whose own state makes it compute other gradients than the worker."""
    return honest(state, 0.0, seed=1)


def test_auditors_that_are_close_by_chance_prove_nothing() -> None:
    statements = {0: depending_on_the_rank(0.020), 1: depending_on_the_rank(0.022)}
    found = judged(statements, num_byzantine=1)
    assert found.outcome == Outcome.INCONCLUSIVE
    assert "chance" in found.reason
    assert found.scattered == {0, 1}
    # Another gradient altogether is wrong, whatever the state.
    statements = {0: depending_on_the_rank(0.500), 1: depending_on_the_rank(0.502)}
    assert judged(statements, num_byzantine=1).outcome == Outcome.WRONGLY


def test_only_what_is_the_same_to_rounding_counts_as_reproduced() -> None:
    statements = {0: depending_on_the_rank(1e-4), 1: depending_on_the_rank(1e-3), 2: depending_on_the_rank(-1e-3)}
    found = judged(statements, num_byzantine=1)
    assert (found.outcome, found.right) == (Outcome.RIGHTLY, {0, 1, 2})
    assert (found.reproduced, found.scattered) == ({0}, {1, 2})


def test_too_few_auditors_are_named() -> None:
    found = judged({0: honest(0.2, 0.0, 1)}, num_byzantine=1)
    assert found.outcome == Outcome.INCONCLUSIVE
    assert "too few" in found.reason


def test_sketches_are_linear_and_have_the_norm_of_the_vector() -> None:
    first, second = torch.randn(2, 30_000, dtype=torch.float64)
    pieces = [first[:7], first[7:5000], first[5000:]]
    torch.testing.assert_close(sketched(pieces, 1), sketched([first], 1))
    torch.testing.assert_close(sketched([first], 1) - sketched([second], 1), sketched([first - second], 1))
    ratios = torch.stack([sketched([first], seed).norm() for seed in range(8)]) / first.norm()
    assert ratios.sub(1).abs().max() < 0.12


KIND = "x"
OWN = [torch.zeros(3), torch.zeros(4, 2, dtype=torch.int64), torch.zeros((), dtype=torch.bool)]


SIZES = st.one_of(st.integers(-(2**63), 2**63 - 1), st.sampled_from([0, 1, 2**31, 2**62]))


@given(st.lists(st.tuples(st.integers(0, 18), SIZES), max_size=4))
def test_any_header_is_accepted_or_refused(changes: list[tuple[int, int]]) -> None:
    header = _described(OWN, KIND)
    assert isinstance(header, Tensor)
    for place, value in changes:
        header[place] = value
    try:
        shapes = _checked(header.tolist(), OWN, KIND, fixed=[0])
    except (MalformedParcelError, OtherStructureError):
        return
    assert shapes[0] == [3]
    assert [len(shape) for shape in shapes] == [1, 2, 0]
    assert all(size >= 0 for shape in shapes for size in shape)
    assert 8 * shapes[1][0] * shapes[1][1] < 1 << 17
    for shape in shapes:
        torch.empty(prod(shape)).view(shape)


def test_other_headers_are_named() -> None:
    def check(content: list[Tensor], kind: str = KIND) -> None:
        header = _described(content, kind)
        assert header is not None
        _checked(header.tolist(), OWN, KIND, fixed=[0])

    check([OWN[0], torch.zeros(40, 2, dtype=torch.int64), OWN[2]])
    with pytest.raises(OtherStructureError, match="another kind"):
        check(OWN[:2], "y")
    with pytest.raises(MalformedParcelError, match="2 tensors, this rank's 3"):
        check(OWN[:2])
    with pytest.raises(MalformedParcelError, match="tensor 1 of its batch has another dtype"):
        check([OWN[0], OWN[1].float(), OWN[2]])
    with pytest.raises(MalformedParcelError, match=r"tensor 0 of its batch has the shape \(4,\)"):
        check([torch.zeros(4), *OWN[1:]])
    with pytest.raises(OtherStructureError, match="has 80000013 bytes"):
        check([OWN[0], torch.zeros(10**6, 10, dtype=torch.int64), OWN[2]])
    with pytest.raises(OtherStructureError, match="bytes"):
        check([OWN[0], torch.zeros(2**62, 0, dtype=torch.int64), OWN[2]])


def test_every_step_of_a_window_but_the_first_is_as_likely() -> None:
    generator, counts = torch.Generator().manual_seed(1), Counter()
    for _ in range(3500):
        window, step = AuditWindow(worker=0, turn=1), 1
        while not window.is_drawn([7, int(torch.randint(2**62, (), generator=generator))]):
            step += 1
        counts[step] += 1
    assert sorted(counts) == list(range(2, 9))
    assert all(400 < count < 600 for count in counts.values())
