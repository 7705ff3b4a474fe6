import oracles
import pytest
import torch
from cases import RuleCase
from exemptions import BETWEEN_TWO, ITERATIVE, MANY_MEDIANS, OWN_UNITS

from lightning_byzantine.aggregators import GeometricMedian

RFA = GeometricMedian(max_iterations=3, tolerance=0, smoothing=0.1, init="zero")
CASES = [
    RuleCase(GeometricMedian(), oracles.geometric_median, [BETWEEN_TWO, MANY_MEDIANS, ITERATIVE]),
    RuleCase(
        GeometricMedian(init="mean"),
        oracles.geometric_median,
        [BETWEEN_TWO, MANY_MEDIANS, ITERATIVE],
        name="GeometricMedian from the mean",
    ),
    RuleCase(
        GeometricMedian(init="median"),
        oracles.geometric_median,
        [BETWEEN_TWO, MANY_MEDIANS, ITERATIVE],
        name="GeometricMedian from the median",
    ),
    RuleCase(RFA, oracles.rfa, [ITERATIVE, OWN_UNITS], name="RFA"),
]


def test_geometric_median_leaves_a_row_it_starts_on() -> None:
    # The mean is row 0, which is not the median: one row pulls left, four pull right.
    rows = torch.tensor([[0.0, 0.0], [-4.0, 0.0], [1.0, 0.1], [1.0, -0.1], [1.0, 0.2], [1.0, -0.2]])
    result = GeometricMedian(init="mean")(rows, num_byzantine=2)
    torch.testing.assert_close(
        result.double().numpy(), oracles.geometric_median(list(rows.double().numpy()), 2), rtol=1e-4, atol=1e-5
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_geometric_median_is_not_led_away_by_where_it_starts(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    rows = torch.randn(101, 5, dtype=dtype)
    rows[:50] = 1e18 if dtype == torch.float32 else 1e149
    assert GeometricMedian()(rows, num_byzantine=50).norm() < 20


def test_geometric_median_arguments() -> None:
    with pytest.raises(ValueError, match="max_iterations must be at least 1, got 0"):
        GeometricMedian(max_iterations=0)
    with pytest.raises(ValueError, match=r"tolerance must be finite and at least 0, got -0.1"):
        GeometricMedian(tolerance=-0.1)
    with pytest.raises(ValueError, match="smoothing must be finite and at least 0, got nan"):
        GeometricMedian(smoothing=float("nan"))
    with pytest.raises(TypeError, match="smoothing must be a number, got '1'"):
        GeometricMedian(smoothing="1")
    with pytest.raises(ValueError, match="init must be 'medoid', 'median', 'mean' or 'zero', got 'random'"):
        GeometricMedian(init="random")
