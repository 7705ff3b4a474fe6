"""What is true of every rule: of each that a test file in this folder declares in a list named CASES."""

import copy
import pkgutil
from collections.abc import Callable, Iterable
from importlib import import_module
from inspect import isabstract
from pathlib import Path
from typing import Any

import pytest
import torch
from cases import RuleCase, declared_in, shown_arguments
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from shards import in_shards
from torch import Tensor
from vectors import as_list, relative_error, workers

from lightning_byzantine import ByzantineBreakdownError, aggregators
from lightning_byzantine.aggregators import Aggregator
from lightning_byzantine.matrix import WorkerMatrix

ALL_CASES: list[RuleCase] = declared_in(Path(__file__).parent, RuleCase)
SIZES = [(1, 0), (2, 0), (3, 0), (3, 1), (4, 1), (5, 2), (6, 2), (7, 1), (8, 2), (9, 4), (11, 2), (17, 8), (33, 10)]

every_case = pytest.mark.parametrize("case", ALL_CASES, ids=lambda case: case.name)

few_or_many_examples = pytest.mark.parametrize(
    "examples", [pytest.param(15, id="few"), pytest.param(30, id="many", marks=pytest.mark.slow)]
)


def every_case_with(*wanted: str, enough: Callable[[Iterable[bool]], bool] = all) -> pytest.MarkDecorator:
    """Parametrise by the cases that have all of these properties, or any of them."""
    cases = [case for case in ALL_CASES if enough(case.has(each) for each in wanted)]
    return pytest.mark.parametrize("case", cases, ids=lambda case: case.name)


def concrete_rules() -> set[type[Aggregator]]:
    names = [f"{aggregators.__name__}.{module.name}" for module in pkgutil.iter_modules(aggregators.__path__)]
    found = [value for name in names for value in vars(import_module(name)).values() if isinstance(value, type)]
    return {each for each in found if issubclass(each, Aggregator) and not isabstract(each)}


def test_every_rule_is_public() -> None:
    missing = {rule.__name__ for rule in concrete_rules()} - set(aggregators.__all__)
    assert not missing, f"lightning_byzantine/aggregators/__init__.py must import and name {sorted(missing)}"


def test_every_rule_is_declared() -> None:
    declared = {type(case.subject) for case in ALL_CASES}
    missing = {rule.__name__ for rule in concrete_rules() - declared}
    assert not missing, f"a test file in {Path(__file__).parent} must declare {sorted(missing)} in its CASES"


def check_against_the_oracle(case: RuleCase, m: int, f: int) -> None:
    rows = workers(m, 60, seed=m)
    expected = case.oracle(as_list(rows), f)
    assert relative_error(case.fresh()(rows, num_byzantine=f), expected, rows) < 1e-5
    for cut in ([60], [1, 59], [20, 3, 37], [1] * 60):
        blocks = case.fresh().aggregate(WorkerMatrix(rows.split(cut, dim=1)), f)
        assert [len(block) for block in blocks] == cut
        assert relative_error(torch.cat(blocks), expected, rows) < 1e-5


def sizes_of(case: RuleCase) -> list[tuple[int, int]]:
    return [(m, f) for m, f in SIZES if case.serves(m, f) and case.has_at("oracle", m, f)]


@every_case_with("oracle")
def test_equals_the_oracle_however_columns_are_cut(case: RuleCase, subtests: pytest.Subtests) -> None:
    for m, f in sizes_of(case):
        if m < case.slow_from:
            with subtests.test(m=m, f=f):
                check_against_the_oracle(case, m, f)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("case", "m", "f"),
    [(case, m, f) for case in ALL_CASES for m, f in sizes_of(case) if m >= case.slow_from],
    ids=lambda value: getattr(value, "name", None),
)
def test_equals_a_slow_oracle_however_columns_are_cut(case: RuleCase, m: int, f: int) -> None:
    check_against_the_oracle(case, m, f)


@few_or_many_examples
@every_case_with("oracle", "ties")
def test_equals_the_oracle_among_duplicates_and_ties(case: RuleCase, examples: int) -> None:
    @settings(max_examples=examples)
    @given(m=st.integers(1, 8), d=st.integers(1, 4), data=st.data())
    def check(m: int, d: int, data: st.DataObject) -> None:
        assume(case.serves(m, 0))
        f = case.at_most(data.draw(st.integers(0, (m - 1) // 2)), m)
        row = st.lists(st.integers(-2, 2), min_size=d, max_size=d)
        rows = torch.tensor(data.draw(st.lists(row, min_size=m, max_size=m)), dtype=torch.float32)
        expected = torch.from_numpy(case.oracle(as_list(rows), f)).float()
        torch.testing.assert_close(case.fresh()(rows, num_byzantine=f), expected, rtol=1e-5, atol=1e-5)

    check()


@every_case_with("cuts")
def test_gives_the_same_bits_however_columns_are_cut(case: RuleCase) -> None:
    rows = workers(9, 10_001, seed=1)
    f = case.at_most(4, 9)
    whole = case.fresh()(rows, num_byzantine=f)
    for cut in ([10_000, 1], [7, 4_990, 5_004]):
        blocks = [block.contiguous() for block in rows.split(cut, dim=1)]
        assert torch.equal(torch.cat(case.fresh().aggregate(WorkerMatrix(blocks), f)), whole)


@every_case_with("oracle")
def test_keeps_the_dtype_and_its_precision(case: RuleCase, subtests: pytest.Subtests) -> None:
    for dtype in (torch.float16, torch.bfloat16, torch.float32, torch.float64):
        with subtests.test(dtype=dtype):
            rows = workers(7, 50, seed=5, dtype=dtype)
            f = case.at_most(2, 7)
            result = case.fresh()(rows, num_byzantine=f)
            assert result.dtype == dtype
            tolerance = {torch.float64: 1e-6}.get(dtype, max(1e-5, 4 * torch.finfo(dtype).eps))
            assert relative_error(result, case.oracle(as_list(rows), f), rows) < tolerance


@st.composite
def matrices(draw: st.DrawFn) -> tuple[Tensor, int]:
    m = draw(st.integers(1, 9))
    d = draw(st.integers(1, 6))
    f = draw(st.integers(0, (m - 1) // 2))
    # Few different values make ties and duplicates, all values make the rest.
    entry = draw(st.sampled_from([st.integers(-2, 2), st.floats(-1e3, 1e3, width=32)]))
    rows = draw(st.lists(st.lists(entry, min_size=d, max_size=d), min_size=m, max_size=m))
    return torch.tensor(rows, dtype=torch.float32), f


@few_or_many_examples
@every_case
def test_never_writes_to_its_input_and_repeats_itself(case: RuleCase, examples: int) -> None:
    @settings(max_examples=examples)
    @given(data=matrices())
    def check(data: tuple[Tensor, int]) -> None:
        rows = data[0]
        assume(case.serves(len(rows), 0))
        f = case.at_most(data[1], len(rows))
        before = rows.clone()
        first = case.fresh()(rows, num_byzantine=f)
        assert torch.equal(rows, before)
        assert first.shape == rows.shape[1:]
        assert first.isfinite().all()
        assert torch.equal(first, case.fresh()(rows.clone(), num_byzantine=f))

    check()


@few_or_many_examples
@every_case_with("translation", "scaling", enough=any)
def test_moves_and_scales_with_its_input(case: RuleCase, examples: int) -> None:
    @settings(max_examples=examples)
    @given(data=matrices(), shift=st.integers(-5, 5), factor=st.sampled_from([-8.0, -1.0, 0.125, 4.0]))
    def check(data: tuple[Tensor, int], shift: int, factor: float) -> None:
        shift = shift if case.has("translation") else 0
        factor = factor if case.has("scaling") else 1.0
        rows = data[0]
        assume(case.serves(len(rows), 0))
        f = case.at_most(data[1], len(rows))
        rows = (rows * 64).round() / 64  # so that float32 moves them exactly
        expected = case.fresh()(rows, num_byzantine=f) * factor + shift
        actual = case.fresh()(rows * factor + shift, num_byzantine=f)
        torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-4 * float(1 + rows.abs().max()))

    check()


@few_or_many_examples
@every_case_with("permutation")
def test_does_not_depend_on_the_order_of_the_workers(case: RuleCase, examples: int) -> None:
    @settings(max_examples=examples)
    @given(seed=st.integers(0, 10_000), m=st.integers(1, 12), data=st.data())
    def check(seed: int, m: int, data: st.DataObject) -> None:
        assume(case.serves(m, 0))
        f = case.at_most(data.draw(st.integers(0, (m - 1) // 2)), m)
        rows = workers(m, 7, seed)
        order = torch.tensor(data.draw(st.permutations(range(m))))
        assume(case.has_at("permutation", m, f))
        expected = case.fresh()(rows, num_byzantine=f)
        torch.testing.assert_close(case.fresh()(rows[order], num_byzantine=f), expected, rtol=1e-4, atol=1e-4)

    check()


@few_or_many_examples
@every_case_with("agreement")
def test_agreement_is_kept(case: RuleCase, examples: int) -> None:
    @settings(max_examples=examples)
    @given(m=st.integers(1, 9), value=st.floats(-1e4, 1e4, width=32), data=st.data())
    def check(m: int, value: float, data: st.DataObject) -> None:
        assume(case.serves(m, 0))
        f = case.at_most(data.draw(st.integers(0, (m - 1) // 2)), m)
        rows = torch.full((m, 3), value)
        torch.testing.assert_close(case.fresh()(rows, num_byzantine=f), rows[0], rtol=1e-5, atol=1e-6)

    check()


ATTACKS_ON_NUMBERS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "1e18": lambda rows, bad: rows.index_fill(0, bad, 1e18),
    "one coordinate 1e18": lambda rows, bad: rows.index_put((bad, torch.tensor(0)), rows.new_tensor(1e18)),
    "opposite 1.2e154": lambda rows, bad: (
        rows.double().index_fill(0, bad[:1], -1.2e154).index_fill(0, bad[1:], 1.2e154).to(rows)
    ),
    "opposite 1e18": lambda rows, bad: rows.index_fill(0, bad[:1], -1e18).index_fill(0, bad[1:], 1e18),
    "1.2e154": lambda rows, bad: rows.index_fill(0, bad, torch.tensor(1.2e154, dtype=torch.float64).to(rows)),
    "largest": lambda rows, bad: rows.index_fill(0, bad, (1e149 if rows.dtype == torch.float64 else 1e18)),
    "1e38": lambda rows, bad: rows.index_fill(0, bad, 1e38),
    "inf": lambda rows, bad: rows.index_fill(0, bad, torch.inf),
    "nan": lambda rows, bad: rows.index_fill(0, bad, torch.nan),
    "one nan": lambda rows, bad: rows.index_put((bad, torch.tensor(2)), rows.new_tensor(torch.nan)),
    "nan and 1e18": lambda rows, bad: rows.index_fill(0, bad[:1], torch.nan).index_fill(0, bad[1:], 1e18),
    "denormal": lambda rows, bad: rows.index_fill(0, bad, 1e-42),
    "identical colluders": lambda rows, bad: rows.index_fill(0, bad, 1e6),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@every_case_with("robustness")
def test_stays_with_the_honest_workers(case: RuleCase, dtype: torch.dtype, subtests: pytest.Subtests) -> None:
    m = case.fewest_workers(2)
    rows = workers(m, 40, seed=11, dtype=dtype)
    rows = rows / rows.norm(dim=1, keepdim=True)
    for bad in ([0, 1], [1, 4], [3, 4]):
        honest = rows[[i for i in range(m) if i not in bad]]
        diameter = torch.pdist(honest).max()
        for name, attack in ATTACKS_ON_NUMBERS.items():
            with subtests.test(attack=name, bad=bad):
                result = case.fresh()(attack(rows, torch.tensor(bad)), num_byzantine=2)
                # The smoothed start at 0 gives a row at 1e18 weight 1e-18: it moves by about one diameter, not by 1e18.
                assert (result - honest.mean(0)).norm() < 3 * diameter


@every_case_with("dropping")
def test_unmeasurable_rows_are_dropped_by_index(case: RuleCase) -> None:
    m = case.fewest_workers(3)
    rows = workers(m, 20, seed=4)
    for bad in (torch.nan, torch.inf, -torch.inf, 1e20):
        poisoned = rows.clone()
        poisoned[1, 3] = bad
        poisoned[6] = bad
        expected = case.fresh()(rows[[i for i in range(m) if i not in (1, 6)]], num_byzantine=1)
        assert torch.equal(case.fresh()(poisoned, num_byzantine=3), expected), f"rows with {bad}"


@every_case
def test_more_unmeasurable_rows_than_num_byzantine_is_a_breakdown(case: RuleCase) -> None:
    rows = workers(7, 20, seed=4)
    rows[[0, 2, 5]] = torch.nan
    f = case.at_most(2, 7)
    with pytest.raises(ByzantineBreakdownError, match=rf"3 of 7 .*workers 0, 2, 5.*num_byzantine={f}") as caught:
        case.fresh()(rows, num_byzantine=f)
    assert caught.value.workers == [0, 2, 5]


BAD_INPUT: list[tuple[Any, Any, type[Exception], str]] = [
    (torch.zeros(8, 2), 4, ValueError, r"num_byzantine must satisfy 0 <= f < m / 2, got f=4 with m=8"),
    (torch.zeros(8, 2), -1, ValueError, r"num_byzantine must satisfy .* got f=-1"),
    (torch.zeros(8, 2), 1.0, TypeError, r"num_byzantine must be an int, got 1.0"),
    (torch.zeros(8, 2), True, TypeError, r"num_byzantine must be an int, got True"),
    (torch.zeros(8), 1, ValueError, r"2D tensor \[num_workers, dimension\], got shape \(8,\)"),
    (torch.zeros(8, 2, 2), 1, ValueError, r"got shape \(8, 2, 2\)"),
    (torch.zeros(0, 2), 0, ValueError, r"must not be empty, got shape \(0, 2\)"),
    (torch.zeros(8, 0), 0, ValueError, r"must not be empty, got shape \(8, 0\)"),
    (torch.zeros(8, 2, dtype=torch.int64), 1, TypeError, r"got torch.int64"),
    (torch.zeros(8, 2, dtype=torch.complex64), 1, TypeError, r"got torch.complex64"),
    ([[1.0]], 0, TypeError, r"torch.Tensor .* got list"),
]


@every_case
def test_bad_input_is_named(case: RuleCase, subtests: pytest.Subtests) -> None:
    for vectors, f, error, message in BAD_INPUT:
        with subtests.test(message=message), pytest.raises(error, match=message):
            case.fresh()(vectors, num_byzantine=f)


@every_case
def test_autocast_and_fast_matrix_products_take_no_digits(case: RuleCase) -> None:
    rows = workers(9, 200, seed=6)
    f = case.at_most(4, 9)
    expected = case.fresh()(rows, num_byzantine=f)
    precision = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("medium")
    try:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            assert torch.equal(case.fresh()(rows, num_byzantine=f), expected)
    finally:
        torch.set_float32_matmul_precision(precision)


@every_case
def test_shards_give_what_the_whole_gives(case: RuleCase) -> None:
    rows = workers(11, 90, seed=8)
    rows[1] = rows[4]  # ties
    f = case.at_most(4, 11)
    shards = in_shards(lambda shard: case.fresh().aggregate(shard, f)[0], list(rows.split(30, dim=1)))
    whole = case.fresh()(rows, num_byzantine=f)
    torch.testing.assert_close(torch.cat(shards), whole, rtol=1e-5, atol=1e-5)


@every_case
def test_shows_its_arguments(case: RuleCase) -> None:
    text = repr(case.fresh())
    assert text.startswith(type(case.subject).__name__)
    assert [shown for shown in shown_arguments(case.subject) if shown not in text] == []


@every_case
def test_resumes_from_its_state(case: RuleCase) -> None:
    rows = 4 + workers(12, 8, seed=3)
    f = case.at_most(2, 12)
    rule, resumed = case.fresh(), case.fresh()
    for _ in range(3):
        rule(rows, num_byzantine=f)
    resumed.load_state_dict(copy.deepcopy(rule.state_dict()))
    for _ in range(2):
        assert torch.equal(resumed(rows, num_byzantine=f), rule(rows, num_byzantine=f))
