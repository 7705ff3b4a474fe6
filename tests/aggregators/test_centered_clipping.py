import copy

import numpy as np
import oracles
import pytest
import torch
from cases import Exempt, RuleCase
from exemptions import OWN_UNITS, SHORTENS
from vectors import workers

from lightning_byzantine.aggregators import (
    ARC,
    CTMA,
    NNM,
    Aggregator,
    Bucketing,
    CenteredClipping,
    CoordinateWiseMedian,
)
from lightning_byzantine.matrix import WorkerMatrix

CASES = [
    RuleCase(CenteredClipping(tau=1.0), oracles.centered_clipping(1.0), [OWN_UNITS, SHORTENS]),
    RuleCase(
        CenteredClipping(5.0, 3),
        oracles.centered_clipping(5.0, 3),
        [OWN_UNITS, SHORTENS, Exempt(["robustness"], because="a center that starts at 0 takes steps of at most tau")],
        name="CenteredClipping, three times",
    ),
]


@pytest.mark.parametrize(
    "rule",
    [
        CenteredClipping(tau=1.0),
        NNM(CenteredClipping(tau=1.0)),
        Bucketing(CenteredClipping(tau=1.0), bucket_size=1),
        ARC(CenteredClipping(tau=1.0)),
    ],
    ids=repr,
)
def test_centered_clipping_goes_on_from_what_was_aggregated_last(rule: Aggregator) -> None:
    rows = 4 + workers(6, 8, seed=3)
    first, second = rule(rows, num_byzantine=1), rule(rows, num_byzantine=1)
    assert not torch.equal(first, second)
    twin = copy.deepcopy(rule)
    stateless = copy.deepcopy(twin)
    state = copy.deepcopy(rule.state_dict())
    assert any("last_aggregate" in key for key in state)
    third = rule(rows, num_byzantine=1)
    twin.load_state_dict(state)
    assert torch.equal(twin(rows, num_byzantine=1), third)
    matrix = WorkerMatrix(list(rows.split([3, 5], dim=1)))
    matrix.previous = list(second.split([3, 5]))
    torch.testing.assert_close(torch.cat(stateless.aggregate(matrix, 1)), third)


def test_centered_clipping_against_its_loop() -> None:
    rule, center = CenteredClipping(tau=2.0, num_iterations=2), np.zeros(8)
    for step in range(5):
        rows = 4 + workers(6, 8, seed=step, dtype=torch.float64)
        center = oracles.centered_clipping(2.0, 2, start=center)(list(rows.numpy()), 1)
        np.testing.assert_allclose(rule(rows, num_byzantine=1).numpy(), center, rtol=1e-9)


def test_only_rules_that_go_on_have_state_for_it() -> None:
    assert not CTMA(NNM(CoordinateWiseMedian())).state_dict()
    assert not CTMA(NNM(CoordinateWiseMedian())).uses_previous
    assert CTMA(NNM(CenteredClipping())).uses_previous
    rule = CenteredClipping()
    rule(torch.ones(3, 2), num_byzantine=1)
    with pytest.raises(ValueError, match=r"as many columns as in the previous call.*got 5 after 2"):
        rule(torch.ones(3, 5), num_byzantine=1)
    assert rule(torch.ones(4, 2, dtype=torch.float64), num_byzantine=1).dtype == torch.float64


def test_centered_clipping_arguments() -> None:
    with pytest.raises(ValueError, match="tau must be finite and above 0, got 0"):
        CenteredClipping(tau=0)
    with pytest.raises(ValueError, match="num_iterations must be at least 1, got 0"):
        CenteredClipping(num_iterations=0)
