import torch
from hypothesis import given
from hypothesis import strategies as st

from lightning_byzantine.matrix.ties import is_decided, mean_of, nearest


@given(st.lists(st.integers(0, 5), min_size=1, max_size=12), st.data())
def test_sorts_by_distance_then_by_index(distances: list[int], data: st.DataObject) -> None:
    count = data.draw(st.integers(0, len(distances)))
    expected = sorted(range(len(distances)), key=lambda i: (distances[i], i))[:count]
    assert nearest(torch.tensor(distances, dtype=torch.float64), count).tolist() == expected


@given(st.permutations(range(8)))
def test_rounding_does_not_decide(order: list[int]) -> None:
    noise = 1 + 1e-13 * torch.tensor(order, dtype=torch.float64)
    assert nearest(noise, 3).tolist() == [0, 1, 2]


def test_differences_above_the_tie_count() -> None:
    assert nearest(torch.tensor([1 + 1e-8, 1.0], dtype=torch.float64), 1).tolist() == [1]


def test_exactly_as_many_as_asked_for_have_weight() -> None:
    assert mean_of(nearest(torch.zeros(4, dtype=torch.float64), 3), 4).tolist() == [1 / 3, 1 / 3, 1 / 3, 0]


def test_bounds_decide_only_what_they_separate() -> None:
    low = torch.tensor([[1.0, 2.0, 5.0], [1.0, 2.0, 2.5]])
    high = torch.tensor([[2.0, 3.0, 6.0], [2.0, 3.0, 3.5]])
    assert is_decided(low[0], high[0], 2)
    assert is_decided(low, high, 3)
    assert not is_decided(low, high, 2)
    assert not is_decided(low[0], high[0], 1)  # 2 to 2 might be a tie
