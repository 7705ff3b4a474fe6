import oracles
import pytest
import torch
from cases import Exempt, RuleCase
from vectors import workers

from lightning_byzantine.aggregators import Bulyan, MultiKrum

CASES = [
    RuleCase(
        Bulyan(),
        oracles.bulyan,
        [Exempt(["permutation"], because="it leaves few rows to Krum, and ties go by index")],
    )
]


def test_bulyan_names_its_bound() -> None:
    with pytest.raises(ValueError, match=r"m >= 4f \+ 3 workers, got m=10 with f=2, for which m must be at least 11"):
        Bulyan()(torch.zeros(10, 2), num_byzantine=2)


def test_bulyan_is_not_led_by_one_coordinate() -> None:
    # Far away in one of many coordinates, rows hide in the spread of all others from Krum.
    rows = workers(11, 2000, seed=0) / 3
    rows[:2] = rows[2:].mean(0)
    rows[:2, 7] += 10
    honest = rows[2:, 7]
    assert MultiKrum()(rows, num_byzantine=2)[7] > honest.mean() + 1.5
    assert honest.min() < Bulyan()(rows, num_byzantine=2)[7] < honest.max()
