import oracles
import pytest
import torch
from cases import RuleCase
from exemptions import TIE_OF_TWO
from vectors import workers

from lightning_byzantine.aggregators import Krum, MultiKrum

CASES = [RuleCase(MultiKrum(), oracles.multi_krum, [TIE_OF_TWO])]


def test_multi_krum_selects_what_it_was_told_to() -> None:
    rows = workers(7, 5, seed=0)
    assert torch.equal(MultiKrum(num_selected=1)(rows, 3), Krum()(rows, 3))
    with pytest.raises(ValueError, match=r"num_selected must be at most m - f, got num_selected=5 with m=7 .* f=3"):
        MultiKrum(num_selected=5)(rows, 3)
    with pytest.raises(ValueError, match="num_selected must be at least 1, got 0"):
        MultiKrum(num_selected=0)
