import itertools
import math
from collections import Counter

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from lightning_byzantine.exchange.votes import majority, median, order_statistic

NUMBERS = st.floats(width=32)


def oracle_of_median(values: list[float]) -> float:
    ordered = sorted((math.inf if math.isnan(value) else value) for value in values)
    low, high = ordered[(len(ordered) - 1) // 2], ordered[len(ordered) // 2]
    return low if low == high else low / 2 + high / 2


@given(st.lists(NUMBERS, min_size=1, max_size=9))
def test_median_of_any_numbers(values: list[float]) -> None:
    found = median(torch.tensor(values, dtype=torch.float64)[:, None]).item()
    num_nans = sum(map(math.isnan, values))
    if 2 * num_nans < len(values):
        expected = oracle_of_median(values)
        assert found == expected or math.isnan(expected)  # the mean of opposite infinities


@given(st.lists(NUMBERS.filter(math.isfinite), min_size=2, max_size=5), st.data())
def test_a_minority_of_anything_stays_within_the_others(honest: list[float], data: st.DataObject) -> None:
    wrong = data.draw(st.lists(NUMBERS, max_size=len(honest) - 1))
    reports = torch.tensor(data.draw(st.permutations(honest + wrong)))[:, None]
    assert min(honest) <= median(reports).item() <= max(honest)
    assert min(honest) <= order_statistic(reports, len(wrong)).item() <= max(honest)
    assert min(honest) <= order_statistic(reports, -1 - len(wrong)).item() <= max(honest)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("num_ranks", [1, 2, 3, 4])
def test_what_all_agree_on_stays_as_it_is(dtype: torch.dtype, num_ranks: int) -> None:
    tiny, huge = torch.finfo(dtype).smallest_normal / 2, torch.finfo(dtype).max
    value = torch.tensor([tiny, huge, -huge, 0.0, -0.0, torch.inf, -torch.inf, 1 / 3], dtype=dtype)
    value[0] = torch.nextafter(torch.zeros((), dtype=dtype), torch.ones((), dtype=dtype))
    found = median(value.repeat(num_ranks, 1))
    assert found.dtype == dtype
    assert torch.equal(found.view(torch.uint8), value.view(torch.uint8))


def oracle_of_majority(column: list[int]) -> int:
    counts = Counter(column)
    return min(value for value in counts if counts[value] == max(counts.values()))


@given(st.integers(1, 7).flatmap(lambda m: st.lists(st.lists(st.integers(-2, 2), min_size=m, max_size=m), min_size=1)))
def test_majority_is_the_most_frequent_value(columns: list[list[int]]) -> None:
    reports = torch.tensor(columns).T
    assert majority(reports).tolist() == [oracle_of_majority(column) for column in columns]


@pytest.mark.parametrize("dtype", [torch.bool, torch.uint8, torch.int8, torch.int32, torch.float8_e4m3fn])
def test_majority_of_other_dtypes(dtype: torch.dtype) -> None:
    for votes in itertools.product([False, True], repeat=3):
        reports: Tensor = torch.tensor(votes)[:, None].to(dtype)
        found = majority(reports)
        assert found.dtype == dtype
        assert bool(found.float()) == (sum(votes) >= 2)


def test_inputs_are_not_written_to() -> None:
    reports = torch.tensor([[3.0], [1.0], [2.0]])
    median(reports), order_statistic(reports, 0), majority(reports)
    assert reports.tolist() == [[3.0], [1.0], [2.0]]
