"""Numbers of other libraries, for whoever comes from them: which rule and which options give the same.

The rows are small enough to check by hand. Every number is computed once more here, from its formula.
"""

import numpy as np
import oracles
import pytest
import torch

from lightning_byzantine.aggregators import (
    ARC,
    CAF,
    CTMA,
    NNM,
    SMEA,
    Aggregator,
    Bulyan,
    CenteredClipping,
    Clipping,
    ComparativeGradientElimination,
    CoordinateWiseMedian,
    CoordinateWiseTrimmedMean,
    GeometricMedian,
    Krum,
    MeaMed,
    Mean,
    MinimumDiameterAveraging,
    MoNNA,
    MultiKrum,
)
from lightning_byzantine.matrix import WorkerMatrix

ROWS = [
    [1.0, 2.0, 0.0],
    [2.0, 1.0, 1.0],
    [0.0, 1.0, -1.0],
    [1.5, 0.0, 2.0],
    [3.0, 2.5, 1.0],
    [-8.0, 9.0, 4.0],
    [0.5, 1.5, -2.0],
]
RFA = GeometricMedian(max_iterations=3, tolerance=0, smoothing=0.1, init="zero")
CONVERGED = GeometricMedian()
BOTH = "ByzFL 0.0.11 and ByzPy 0.1.4"

# Of the seven rows, f = 2: whose number, our rule, its oracle, the number.
SAME: list[tuple[str, Aggregator, oracles.Oracle, list[float]]] = [
    (BOTH, Mean(), oracles.mean, [0.0, 2.428571428571, 0.714285714286]),
    (BOTH, CoordinateWiseMedian(), oracles.coordinate_wise_median, [1.0, 1.5, 1.0]),
    (BOTH, CoordinateWiseTrimmedMean(), oracles.coordinate_wise_trimmed_mean, [1.0, 1.5, 0.666666666667]),
    (
        "ByzFL: GeometricMedian(nu=0.1, T=3); the paper's code: rfa",
        RFA,
        oracles.rfa,
        [1.0263935326, 1.7103846697, 0.128856425],
    ),
    ("ByzFL: Krum(f)", Krum(), oracles.krum, [1.0, 2.0, 0.0]),
    ("ByzFL: MultiKrum(f)", MultiKrum(), oracles.multi_krum, [1.5, 1.3, 0.6]),
    (
        "ByzPy: MultiKrum(f, q=3)",
        MultiKrum(num_selected=3),
        lambda rows, f: oracles.mean([rows[i] for i in np.argsort(oracles.krum_scores(rows, f))[:3]], f),
        [1.0, 1.333333333333, 0.0],
    ),
    (BOTH, NNM(Mean()), oracles.nnm(oracles.mean), [1.057142857143, 1.628571428571, 0.257142857143]),
    (
        "ByzFL: Median after NNM(f)",
        NNM(CoordinateWiseMedian()),
        oracles.nnm(oracles.coordinate_wise_median),
        [1.3, 1.3, 0.4],
    ),
    (
        "the paper: CTMA, ties by index",
        CTMA(CoordinateWiseMedian()),
        oracles.ctma(oracles.coordinate_wise_median),
        [1.5, 1.3, 0.6],
    ),
    (f"{BOTH} (MeanOfMedians)", MeaMed(), oracles.mea_med, [1.0, 1.6, 0.6]),
    (BOTH, MinimumDiameterAveraging(), oracles.minimum_diameter_averaging, [1.5, 1.3, 0.6]),
    (BOTH, MoNNA(reference=0), oracles.monna, [1.3, 1.6, -0.2]),
    ("ByzPy", ComparativeGradientElimination(), oracles.comparative_gradient_elimination, [1.0, 1.1, 0.0]),
    ("ByzPy", SMEA(), oracles.smea, [1.5, 1.3, 0.6]),
    (
        "ByzFL: CenteredClipping(tau=2.0), first call",
        CenteredClipping(tau=2.0),
        oracles.centered_clipping(2.0),
        [0.6210132555, 1.0629991216, 0.1391706805],
    ),
    (
        f"{BOTH}: mean after Clipping(2.0)",
        Clipping(Mean()),
        oracles.clipping(oracles.mean, 2.0),
        [0.6210132555, 1.0629991216, 0.1391706805],
    ),
    (f"{BOTH}: mean after ARC(f)", ARC(Mean()), oracles.arc(oracles.mean), [0.7557043514, 1.2699292119, 0.2051676572]),
]


def rows(count: int = 7) -> torch.Tensor:
    return torch.tensor(ROWS, dtype=torch.float64)[:count]


def of_lists(vectors: torch.Tensor) -> list[np.ndarray]:
    return list(vectors.numpy())


@pytest.mark.parametrize(
    ("whose", "rule", "oracle", "expected"), SAME, ids=[f"{case[0]}: {case[1]!r}" for case in SAME]
)
def test_gives_the_published_number(
    whose: str, rule: Aggregator, oracle: oracles.Oracle, expected: list[float]
) -> None:
    np.testing.assert_allclose(oracle(of_lists(rows()), 2), expected, atol=1e-9)
    np.testing.assert_allclose(rule(rows(), num_byzantine=2).numpy(), expected, atol=1e-9)


def test_centered_clipping_of_byzfl_goes_on() -> None:
    rule = CenteredClipping(tau=2.0)
    rule(rows(), num_byzantine=2)
    np.testing.assert_allclose(
        rule(rows(), num_byzantine=2).numpy(), [0.9100185078, 1.4297467003, 0.2034927998], atol=1e-9
    )


def test_centered_clipping_of_byzpy_starts_from_the_mean() -> None:
    expected = [1.0474165288, 1.5579015909, 0.2585701344]
    mean = rows().mean(0)
    np.testing.assert_allclose(
        oracles.centered_clipping(2.0, 10, start=mean.numpy())(of_lists(rows()), 2), expected, atol=1e-9
    )
    matrix = WorkerMatrix([rows()])
    matrix.previous = [mean]
    result = CenteredClipping(tau=2.0, num_iterations=10).aggregate(matrix, 2)[0]
    np.testing.assert_allclose(result.numpy(), expected, atol=1e-9)


def test_the_geometric_median_of_byzpy_has_converged_to_its_tolerance() -> None:
    result = CONVERGED(rows(), num_byzantine=2).numpy()
    np.testing.assert_allclose(result, oracles.geometric_median(of_lists(rows()), 2), atol=1e-6)
    np.testing.assert_allclose(result, [1.0201437721, 1.8021249325, 0.090248163], atol=1e-5)


def test_for_even_m_byzfl_and_we_take_the_mean_of_the_middle_two() -> None:
    np.testing.assert_allclose(CoordinateWiseMedian()(rows(6), num_byzantine=2).numpy(), [1.25, 1.5, 1.0])
    np.testing.assert_allclose(MeaMed()(rows(6), num_byzantine=2).numpy(), [1.125, 1.625, 1.0])


def test_for_even_m_byzpy_and_the_code_of_the_paper_take_the_lower() -> None:
    lower = np.sort(rows(6).numpy(), axis=0)[2]
    np.testing.assert_allclose(lower, [1.0, 1.0, 1.0])
    nearest = [sorted(values, key=lambda value: abs(value - 1.0))[:4] for values in rows(6).numpy().T]
    np.testing.assert_allclose(np.mean(nearest, axis=1), [1.125, 1.0, 1.0])


def test_krum_of_the_paper_counts_one_neighbour_less() -> None:
    line = torch.tensor([[0.0], [1.0], [2.5], [3.0], [6.0], [6.5], [7.0]])
    for fewer, expected in ((0, 2.5), (1, 1.0)):
        scores = [sorted(float((a - b) ** 2) for b in line)[1 : 7 - 2 - fewer] for a in line]
        assert float(line[np.argmin([sum(nearest) for nearest in scores])]) == expected
    assert Krum()(line, num_byzantine=2) == 2.5


@pytest.mark.parametrize(
    ("values", "of_all", "of_those_left"),
    [
        ([1.0, 2.0, 3.0, 5.0, -40.0], 2.5395509915944, 2.7145337414904),
        ([1.0, 2.0, 4.0, 8.0, 40.0, 3.5], 3.4133511044433, 3.7672739773118),
    ],
)
def test_caf_of_byzfl_and_byzpy_compares_with_rows_of_weight_0(
    values: list[float], of_all: float, of_those_left: float
) -> None:
    # On a line there is one direction only, which every way of finding eigenvectors finds.
    points, weights, best, least = np.array(values), np.ones(len(values)), 0.0, np.inf
    while weights.sum() > len(values) - 2:
        center = (weights * points).sum() / weights.sum()
        squared = (points - center) ** 2
        spread = (weights * squared).sum() / weights.sum()
        best, least = (center, spread) if spread < least else (best, least)
        weights = weights * (1 - squared / squared.max())
    np.testing.assert_allclose(best, of_all, atol=1e-9)
    vectors = torch.tensor(values, dtype=torch.float64)[:, None]
    np.testing.assert_allclose(oracles.caf(of_lists(vectors), 1), of_those_left, atol=1e-9)
    np.testing.assert_allclose(CAF()(vectors, num_byzantine=1).numpy(), of_those_left, atol=1e-9)


def test_bulyan_by_hand() -> None:
    expected = [1.5, 1.0, 1.0]
    np.testing.assert_allclose(oracles.bulyan(of_lists(rows()), 1), expected, atol=1e-9)
    np.testing.assert_allclose(Bulyan()(rows(), num_byzantine=1).numpy(), expected, atol=1e-9)
