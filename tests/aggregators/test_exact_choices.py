"""Rounding breaks no tie: what rules choose by distances from a coordinate-wise center, against fractions."""

from collections.abc import Callable
from fractions import Fraction

import exact_oracles as exact
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from shards import in_shards
from torch import Tensor

from lightning_byzantine.aggregators import (
    CTMA,
    NNM,
    Aggregator,
    Bulyan,
    CoordinateWiseMedian,
    CoordinateWiseTrimmedMean,
    MeaMed,
)
from lightning_byzantine.matrix import WorkerMatrix

DTYPES = [torch.float16, torch.bfloat16, torch.float32, torch.float64]
BASES: list[tuple[Callable[[], Aggregator], exact.Oracle]] = [
    (CoordinateWiseMedian, exact.median),
    (CoordinateWiseTrimmedMean, exact.trimmed_mean),
    (MeaMed, exact.mea_med),
    (Bulyan, exact.bulyan),
]
RULES: list[tuple[Aggregator, exact.Oracle]] = [
    pair
    for make, oracle in BASES
    for pair in [
        (make(), oracle),
        (CTMA(make()), exact.ctma(oracle)),
        (NNM(make()), exact.nnm(oracle)),
        (CTMA(NNM(make())), exact.ctma(exact.nnm(oracle))),
        (NNM(CTMA(make())), exact.nnm(exact.ctma(oracle))),
    ]
]


def name(rule: object) -> str | None:
    return "".join(repr(rule).split()) if isinstance(rule, Aggregator) else None


def assert_exact(rule: Aggregator, oracle: exact.Oracle, rows: Tensor, f: int) -> None:
    expected = torch.tensor([float(x) for x in oracle([[Fraction(x) for x in row] for row in rows.tolist()], f)])
    atol = float(2 * torch.finfo(rows.dtype).eps * rows.abs().max())
    if rows.dtype == torch.float64:
        atol = 1e-6 * atol if atol > 1 else 1e-6  # `expected` is of float32, which shows any other choice
    torch.testing.assert_close(rule(rows, num_byzantine=f).float(), expected, rtol=1e-6, atol=atol)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_values_as_far_below_the_median_as_above_count_half(dtype: torch.dtype) -> None:
    rows = torch.tensor([[0.1], [0.1], [0.7], [0.7]], dtype=dtype)
    torch.testing.assert_close(MeaMed()(rows, num_byzantine=1), torch.tensor([0.4], dtype=dtype))
    # 60,000 + 0.001 from the lower one, 60,000 - 0.001 from the higher one: no tie.
    rows = torch.tensor([[-6e4], [1e-3], [6e4]], dtype=dtype)
    torch.testing.assert_close(MeaMed()(rows, num_byzantine=1), torch.tensor([30000.0005], dtype=dtype))


@pytest.mark.parametrize("base", [CoordinateWiseMedian, CoordinateWiseTrimmedMean, MeaMed])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_rows_as_far_from_the_center_tie_by_index(dtype: torch.dtype, base: Callable[[], Aggregator]) -> None:
    rows = torch.tensor([[0.1, 0.0], [0.1, 0.0], [0.7, 0.0], [0.7, 0.0]], dtype=dtype)
    torch.testing.assert_close(CTMA(base())(rows, num_byzantine=1), torch.tensor([0.3, 0.0], dtype=dtype))


@pytest.mark.parametrize("move", [0.0, 3.0, 1000.0])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_averages_of_rows_tie_wherever_they_are(dtype: torch.dtype, move: float) -> None:
    rows = move + torch.tensor([[0.0], [2.0], [2.0], [0.0]], dtype=dtype)
    expected = torch.tensor([rows[0] + 4 / 3], dtype=dtype)
    torch.testing.assert_close(CTMA(NNM(CoordinateWiseMedian()))(rows, num_byzantine=1), expected)


@pytest.mark.parametrize("examples", [20, pytest.param(100, marks=pytest.mark.slow)])
@pytest.mark.parametrize(("rule", "oracle"), RULES, ids=name)
def test_chooses_as_in_fractions(rule: Aggregator, oracle: exact.Oracle, examples: int) -> None:
    @settings(max_examples=examples)
    @given(data=st.data(), dtype=st.sampled_from(DTYPES), move=st.sampled_from([0, 0, 1, 7, 100, 1000]))
    def check(data: st.DataObject, dtype: torch.dtype, move: int) -> None:
        is_bulyan = "Bulyan" in repr(rule)
        m, d = data.draw(st.integers(7 if is_bulyan else 1, 11 if is_bulyan else 8)), data.draw(st.integers(1, 3))
        f = data.draw(st.integers(0, (m - 3) // 4 if is_bulyan else (m - 1) // 2))
        unit = data.draw(st.sampled_from([1.0, 0.1, 0.3]))
        numbers = st.lists(st.integers(-4, 4), min_size=d, max_size=d)
        integers = torch.tensor(data.draw(st.lists(numbers, min_size=m, max_size=m)), dtype=torch.float64)
        assert_exact(rule, oracle, (unit * integers).to(dtype) + move, f)

    check()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("make", [CoordinateWiseMedian, CoordinateWiseTrimmedMean])
def test_compiled_and_in_shards_the_same_rows_are_chosen(make: type[Aggregator], dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(0)
    integers = torch.randint(-3, 4, (6, 5), generator=generator)
    integers[3:] = 2 - integers[:3]  # as far from the center 1 as their opposites
    rows = (0.1 * integers).to(dtype).repeat(1, 1800)
    for wrap in (CTMA, lambda base: CTMA(NNM(base))):
        whole = wrap(make())(rows, num_byzantine=2)
        assert torch.equal(wrap(make(compile=True))(rows, num_byzantine=2), whole)
        shards = in_shards(lambda shard: wrap(make()).aggregate(shard, 2)[0], list(rows.split(4500, dim=1)))  # noqa: B023
        assert torch.equal(torch.cat(shards), whole)
        assert torch.equal(torch.cat(wrap(make()).aggregate(WorkerMatrix(rows.split([1, 8999], dim=1)), 2)), whole)


def test_far_rows_take_no_ties_from_the_others() -> None:
    rows = torch.tensor([[1e18, 0.0], *[[0.1, 0.0]] * 3, *[[0.7, 0.0]] * 3, [-1e18, 1.0]])
    torch.testing.assert_close(CTMA(CoordinateWiseMedian())(rows, num_byzantine=3), torch.tensor([0.34, 0.0]))
