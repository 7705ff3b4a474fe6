import oracles
import pytest
import torch
from cases import Exempt, RuleCase
from exemptions import ABOUT_ZERO, MIXED_TIES

from lightning_byzantine.aggregators import (
    ARC,
    CAF,
    CTMA,
    NNM,
    SMEA,
    Aggregator,
    CoordinateWiseMedian,
    GeometricMedian,
    Krum,
    Mean,
    MinimumDiameterAveraging,
)

CASES = [
    RuleCase(ARC(CoordinateWiseMedian()), oracles.arc(oracles.coordinate_wise_median), [ABOUT_ZERO]),
    RuleCase(ARC(SMEA()), oracles.arc(oracles.smea), [ABOUT_ZERO], slow_from=17),
    RuleCase(
        ARC(NNM(MinimumDiameterAveraging())),
        oracles.arc(oracles.nnm(oracles.minimum_diameter_averaging)),
        [
            ABOUT_ZERO,
            MIXED_TIES,
            Exempt(["permutation"], because="several sets of rows may have the same diameter, and the first one wins"),
        ],
    ),
]


@pytest.mark.parametrize("base", [Krum(), CoordinateWiseMedian(), GeometricMedian(), CTMA(Mean()), CAF()], ids=repr)
def test_arc_where_most_send_nothing(base: Aggregator) -> None:
    rows = torch.zeros(7, 3)
    rows[[0, 3]] = torch.tensor([[1e18], [-5.0]])
    assert torch.equal(ARC(base)(rows, num_byzantine=3), torch.zeros(3))
