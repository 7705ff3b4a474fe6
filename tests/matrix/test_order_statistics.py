from itertools import product

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lightning_byzantine.matrix.order_statistics import order_statistics


@pytest.mark.parametrize("num_rows", range(1, 13))
def test_sorts_every_sequence_of_zeros_and_ones(num_rows: int) -> None:
    """A network that does that sorts everything: the zero-one principle."""
    rows = torch.tensor(list(product([0.0, 1.0], repeat=num_rows))).T
    assert torch.equal(torch.stack(order_statistics(rows.clone(), range(num_rows))), rows.sort(dim=0).values)


@given(m=st.integers(1, 70), seed=st.integers(0, 1000), data=st.data())
def test_selects_what_sorting_would(m: int, seed: int, data: st.DataObject) -> None:
    ranks = data.draw(st.lists(st.integers(0, m - 1), min_size=1, max_size=4))
    rows = torch.randn(m, 20, generator=torch.Generator().manual_seed(seed))
    assert torch.equal(torch.stack(order_statistics(rows.clone(), ranks)), rows.sort(dim=0).values[ranks])


def test_infinities_and_ties_are_values_like_others() -> None:
    rows = torch.tensor([[torch.inf, 1.0], [-torch.inf, 1.0], [0.0, 1.0]])
    assert torch.equal(torch.stack(order_statistics(rows.clone(), [0, 1, 2])), rows.sort(dim=0).values)
