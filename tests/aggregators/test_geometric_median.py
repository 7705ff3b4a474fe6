import numpy as np
import oracles
import pytest
import torch
from cases import RuleCase
from exemptions import ITERATIVE, OWN_UNITS
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from vectors import as_list, workers

from lightning_byzantine.aggregators import GeometricMedian
from lightning_byzantine.matrix import Combination, WorkerMatrix

RFA = GeometricMedian(max_iterations=3, tolerance=0, smoothing=0.1, init="zero")
CASES = [
    RuleCase(GeometricMedian(), oracles.geometric_median, [ITERATIVE]),
    RuleCase(RFA, oracles.rfa, [ITERATIVE, OWN_UNITS], name="RFA"),
]


def distance_from_the_median(rows: Tensor, **arguments: int) -> float:
    """Return how far the result is from the oracle's before it is rounded, as a fraction of the median distance."""
    point = GeometricMedian(**arguments).locate(WorkerMatrix([rows]), 0)
    assert isinstance(point, Combination)
    exact = as_list(rows)
    median = oracles.geometric_median(exact, 0)
    found = sum(weight * row for weight, row in zip(point.weights.tolist(), exact, strict=True))
    scale = np.median([np.linalg.norm(row - median) for row in exact])
    return float(np.linalg.norm(found - median) / scale) if scale > 0 else float(np.linalg.norm(found - median))


def with_colluders(m: int, f: int, d: int, seed: int, distance: float, spread: float = 0.0) -> Tensor:
    """Return rows about 0, the first f of them together and far away."""
    generator = torch.Generator().manual_seed(seed)
    rows = torch.randn(m, d, generator=generator, dtype=torch.float64)
    direction = torch.randn(d, generator=generator, dtype=torch.float64)
    rows[:f] = distance * direction / direction.norm() + spread * rows[:f]
    return rows


def pull(row: Tensor, others: Tensor) -> float:
    differences = others - row
    return float((differences / differences.norm(dim=1, keepdim=True)).sum(0).norm())


def beside_colluders(m: int, f: int, d: int, seed: int, excess: float) -> Tensor:
    """Return rows whose median is next to f equal ones, because the others pull a little harder."""
    rows = with_colluders(m, f, d, seed, 1.0)
    direction = rows[0].clone()
    low, high = 0.0, 100.0
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (low, middle) if pull(middle * direction, rows[f:]) > f else (middle, high)
    rows[:f] = high * (1 + excess) * direction
    return rows


@pytest.mark.parametrize(
    "rows",
    [
        torch.tensor(
            [[-1.1001573, 2.1536564], [10.6963768, -6.2193694], [-4.237566, 1.6966576], [0.4801774, -0.8463106]]
        ),
        *(with_colluders(33, 16, 20, seed=0, distance=distance) for distance in (1.0, 5.0, 30.0, 1e6, 1e18)),
        with_colluders(33, 16, 2, seed=1, distance=3.0).float(),
        *(with_colluders(9, 4, 30, seed=seed, distance=8.0) for seed in range(3)),
        *(with_colluders(9, 4, 3, seed=1, distance=5.0, spread=spread) for spread in (1e-9, 1e-6, 1e-3)),
        *(beside_colluders(33, 16, 3, seed=2, excess=excess) for excess in (1e-10, 1e-6, 1e-2)),
        *(with_colluders(5, 2, 100, seed=2, distance=1.0) * torch.tensor([[1e18], [1e9], [1.0], [1.0], [1.0]]),),
        1e3 + with_colluders(33, 16, 20, seed=0, distance=5.0),
        torch.randn(64, 100, generator=torch.Generator().manual_seed(0)),
    ],
    ids=lambda rows: f"{len(rows)}x{rows.shape[1]}",
)
def test_to_a_ten_millionth_in_a_few_iterations(rows: Tensor) -> None:
    assert distance_from_the_median(rows, max_iterations=20) < 1e-7


@st.composite
def configurations(draw: st.DrawFn) -> Tensor:
    m, d = draw(st.integers(3, 64)), draw(st.sampled_from([1, 2, 2, 3, 5, 30]))
    f, seed = draw(st.integers(1, (m - 1) // 2)), draw(st.integers(0, 10_000))
    distance, spread = 10.0 ** draw(st.integers(-3, 18)), draw(st.sampled_from([0.0, 0.0, 1e-6, 1e-3, 1.0]))
    rows = with_colluders(m, f, d, seed, distance, spread)
    if draw(st.booleans()):  # nearly on a line
        rows[:, 1:] *= draw(st.sampled_from([1e-3, 1e-2, 0.1]))
    if draw(st.booleans()) and distance < 1e6:
        rows += 100
    return rows if draw(st.booleans()) else rows.float()


@pytest.mark.parametrize("examples", [40, pytest.param(600, marks=pytest.mark.slow)])
def test_is_the_median_of_colluders_clusters_outliers_and_lines(examples: int) -> None:
    @settings(max_examples=examples)
    @given(configurations())
    def check(rows: Tensor) -> None:
        assert distance_from_the_median(rows) < 1e-7

    check()


@given(
    numbers=st.lists(st.integers(-4, 4), min_size=1, max_size=9),
    shift=st.sampled_from([0, 3, 1024, 1_000_000]),
    dtype=st.sampled_from([torch.float32, torch.float64]),
    data=st.data(),
)
def test_rows_on_a_line_have_the_median_of_numbers(
    numbers: list[int], shift: int, dtype: torch.dtype, data: st.DataObject
) -> None:
    order = data.draw(st.permutations(numbers))
    direction = torch.tensor([1.0, -2.0, 0.5], dtype=dtype)
    rows = shift + torch.tensor(order, dtype=dtype)[:, None] * direction
    expected = shift + float(np.median(numbers)) * direction
    torch.testing.assert_close(GeometricMedian()(rows, num_byzantine=0), expected, rtol=1e-6, atol=1e-7)


def test_copies_have_the_same_weight() -> None:
    rows = with_colluders(9, 4, 3, seed=0, distance=2.0)
    weights = GeometricMedian().locate(WorkerMatrix([rows]), 4).weights
    torch.testing.assert_close(weights[:4], weights[0].expand(4))


@pytest.mark.parametrize("init", ["medoid", "median", "mean", "zero"])
def test_the_iteration_of_weiszfeld_alone_gets_near(init: str) -> None:
    rows = workers(9, 20, seed=0)
    expected = torch.from_numpy(oracles.geometric_median(as_list(rows), 0)).float()
    rule = GeometricMedian(max_iterations=200, tolerance=0, init=init)
    torch.testing.assert_close(rule(rows, num_byzantine=4), expected, rtol=1e-4, atol=1e-4)


def test_the_iteration_of_weiszfeld_leaves_a_row_it_starts_on() -> None:
    # The mean is row 0, which is not the median: one row pulls left, four pull right.
    rows = torch.tensor([[0.0, 0.0], [-4.0, 0.0], [1.0, 0.1], [1.0, -0.1], [1.0, 0.2], [1.0, -0.2]])
    result = GeometricMedian(init="mean", max_iterations=300, tolerance=0)(rows, num_byzantine=2)
    expected = torch.from_numpy(oracles.geometric_median(as_list(rows), 2)).float()
    torch.testing.assert_close(result, expected, rtol=1e-4, atol=1e-5)


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
