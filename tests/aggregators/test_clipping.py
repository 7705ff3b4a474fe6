import oracles
import pytest
import torch
from cases import RuleCase
from exemptions import ITERATIVE, OWN_UNITS, SHORTENS, TIE_OF_TWO
from vectors import workers

from lightning_byzantine.aggregators import NNM, SMEA, Aggregator, Clipping, CoordinateWiseMedian, GeometricMedian, Krum

CASES = [
    RuleCase(Clipping(Krum(), 9.0), oracles.clipping(oracles.krum, 9.0), [OWN_UNITS, SHORTENS, TIE_OF_TWO]),
    RuleCase(
        Clipping(GeometricMedian()),
        oracles.clipping(oracles.geometric_median, 2.0),
        [OWN_UNITS, SHORTENS, ITERATIVE],
    ),
]


def test_clipping_leaves_short_rows_alone() -> None:
    rows = workers(7, 20, seed=1)
    assert torch.equal(Clipping(Krum(), max_norm=1e3)(rows, num_byzantine=3), Krum()(rows, num_byzantine=3))


@pytest.mark.parametrize("base", [Krum(), GeometricMedian(), NNM(CoordinateWiseMedian()), SMEA()], ids=repr)
def test_clipped_distances_are_right_in_spite_of_a_common_offset(base: Aggregator) -> None:
    torch.manual_seed(0)
    rows = 1e6 + torch.randn(9, 50, dtype=torch.float64)
    rows[0] = 1e100
    norms = rows.norm(dim=1, keepdim=True)
    expected = base(rows * (3 / norms), num_byzantine=4)
    actual = Clipping(base, max_norm=3.0)(rows, num_byzantine=4)
    spread = torch.pdist(rows[1:]).mean() * 3 / norms[1]
    # The row of 1e100 is clipped to the others' place, to 16 digits of its length, of which the spread leaves ten.
    assert (actual - expected).norm() < 1e-3 * spread


def test_the_longest_norm_must_be_positive() -> None:
    with pytest.raises(ValueError, match="max_norm must be finite and above 0, got nan"):
        Clipping(Krum(), max_norm=float("nan"))
