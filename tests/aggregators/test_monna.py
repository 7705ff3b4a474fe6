import pickle

import numpy as np
import oracles
import pytest
import torch
from cases import Exempt, RuleCase
from exemptions import MIXED_TIES
from vectors import workers

from lightning_byzantine import ByzantineBreakdownError
from lightning_byzantine.aggregators import CTMA, NNM, Bucketing, MoNNA
from lightning_byzantine.errors import ReferenceLostError

BY_INDEX = Exempt(["permutation"], because="the trusted worker is another one than the others")
TRUSTS_BAD = Exempt(["robustness"], because="the tests make worker 0 Byzantine, which is the trusted one here")
MOVES_UP = Exempt(["dropping"], because="without worker 1, the trusted worker is the second row, and not the third")


def trusting_2(rows: oracles.Rows, f: int) -> np.ndarray:
    return oracles.mean(oracles.nearest(rows, rows[2], len(rows) - f), f)


CASES = [
    RuleCase(MoNNA(), oracles.monna, [BY_INDEX, TRUSTS_BAD]),
    RuleCase(CTMA(MoNNA()), oracles.ctma(oracles.monna), [BY_INDEX, TRUSTS_BAD, MIXED_TIES]),
    RuleCase(MoNNA(reference=2), trusting_2, [BY_INDEX, MOVES_UP], name="MoNNA of worker 2"),
    RuleCase(
        CTMA(MoNNA(reference=2)),
        oracles.ctma(trusting_2),
        [BY_INDEX, MOVES_UP, MIXED_TIES],
        name="CTMA(MoNNA of worker 2)",
    ),
]


def test_monna_knows_its_worker_when_others_are_dropped() -> None:
    rows = torch.tensor([[torch.nan], [7.0], [1.0], [2.0], [8.0]])
    torch.testing.assert_close(MoNNA(reference=3)(rows, num_byzantine=2), torch.tensor([10 / 3]))
    torch.testing.assert_close(NNM(MoNNA(reference=3))(rows, num_byzantine=2), torch.tensor([37 / 9]))


def test_monna_without_its_worker() -> None:
    rows = workers(5, 3, seed=0)
    with pytest.raises(ValueError, match="reference must be the index of one of m=5 workers, got reference=5"):
        CTMA(MoNNA(reference=5))(rows, num_byzantine=2)
    with pytest.raises(ValueError, match="reference must be at least 0, got -1"):
        MoNNA(reference=-1)
    with pytest.raises(ValueError, match="base must not be MoNNA nor contain it"):
        Bucketing(CTMA(MoNNA()))
    rows[3] = torch.nan
    with pytest.raises(ReferenceLostError, match=r"the trusted worker 3 sent a non-finite") as caught:
        CTMA(NNM(MoNNA(reference=3)))(rows, num_byzantine=2)
    assert isinstance(caught.value, ByzantineBreakdownError)
    assert str(pickle.loads(pickle.dumps(caught.value))) == str(caught.value)
