"""How far an aggregate can be from the honest mean: never less than it is, for any honest set; and not much more."""

import copy
from itertools import combinations, cycle

import pytest
import torch
from cases import name_of
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from lightning_byzantine import attacks
from lightning_byzantine.aggregators import (
    ARC,
    CAF,
    CTMA,
    NNM,
    Aggregator,
    Bucketing,
    CoordinateWiseMedian,
    GeometricMedian,
    Krum,
    Mean,
    MultiKrum,
    PerLayer,
    PersistentFilter,
    Report,
)
from lightning_byzantine.aggregators.certificate import distance_from_honest_mean
from lightning_byzantine.attacks import Attack
from lightning_byzantine.matrix import Segments, WorkerMatrix

ROUNDING = 1 + 1e-6


def farthest_mean(rows: Tensor, point: Tensor, num_honest: int) -> float:
    """Return the largest distance of a mean of so many rows from a point, by looking at all of them."""
    sets = combinations(range(len(rows)), num_honest)
    return max(float((rows[list(honest)].mean(0) - point).norm()) for honest in sets)


def bound_of(rows: Tensor, point: Tensor, num_honest: int) -> float:
    return distance_from_honest_mean((rows - point) @ (rows - point).T, num_honest)


def drawn(m: int, d: int, seed: int, spread: float = 0.0) -> tuple[Tensor, Tensor]:
    """Return rows, of sizes that differ by this much, and a combination of them."""
    generator = torch.Generator().manual_seed(seed)
    sizes = (spread * torch.randn(m, 1, generator=generator, dtype=torch.float64)).exp()
    rows = sizes * torch.randn(m, d, generator=generator, dtype=torch.float64)
    weights = torch.rand(m, generator=generator, dtype=torch.float64)
    return rows, weights / weights.sum() @ rows


@given(
    m=st.integers(1, 9), d=st.sampled_from([1, 3, 50]), seed=st.integers(0, 999), spread=st.sampled_from([0, 0.5, 4])
)
def test_bounds_the_distance_from_the_mean_of_every_set(m: int, d: int, seed: int, spread: float) -> None:
    rows, point = drawn(m, d, seed, spread)
    for num_honest in range(m // 2 + 1, m + 1):
        exact = farthest_mean(rows, point, num_honest)
        bound = bound_of(rows, point, num_honest)
        assert exact <= bound * ROUNDING
        assert bound <= (3.0 if spread else 2.0) * exact


@pytest.mark.parametrize(("m", "f"), [(5, 2), (9, 2), (9, 4), (12, 5)])
def test_is_tight_for_noise_of_many_columns(m: int, f: int) -> None:
    for seed in range(5):
        rows, point = drawn(m, 2000, seed)
        assert bound_of(rows, point, m - f) <= 1.02 * farthest_mean(rows, point, m - f)


@pytest.mark.parametrize(("m", "f"), [(5, 2), (17, 8), (64, 20)])
def test_is_the_resilience_of_the_mean_for_orthogonal_rows(m: int, f: int) -> None:
    rows = torch.eye(m, dtype=torch.float64)  # all eigenvalues about the mean are 1
    expected = (1 / (m - f) - 1 / m) ** 0.5
    assert bound_of(rows, rows.mean(0), m - f) == pytest.approx(expected, rel=1e-9)


@given(seed=st.integers(0, 999), scale=st.floats(1e-100, 1e100), order=st.permutations(range(6)))
def test_order_scale_and_position_do_not_matter(seed: int, scale: float, order: list[int]) -> None:
    rows, point = drawn(6, 20, seed)
    moved = bound_of(scale * (rows[order] + 1), scale * (point + 1), 4)
    assert moved == pytest.approx(scale * bound_of(rows, point, 4), rel=1e-9)


@pytest.mark.parametrize("num_honest", [1, 3, 5])
def test_equal_rows_are_where_they_are(num_honest: int) -> None:
    rows = torch.ones(5, 4, dtype=torch.float64)
    assert bound_of(rows, rows[0], num_honest) == 0
    assert bound_of(rows, 0 * rows[0], num_honest) == pytest.approx(2)


@pytest.mark.parametrize("seed", range(4))
def test_more_honest_rows_lower_the_bound(seed: int) -> None:
    rows, point = drawn(9, 200, seed)
    bounds = [bound_of(rows, point, num_honest) for num_honest in range(5, 10)]
    assert bounds == sorted(bounds, reverse=True)
    assert bounds[-1] == pytest.approx(float((rows.mean(0) - point).norm()))


RULES: list[Aggregator] = [
    PersistentFilter(),
    CTMA(NNM(GeometricMedian())),
    NNM(GeometricMedian()),
    CAF(),
    GeometricMedian(),
    PerLayer(NNM(GeometricMedian())),
    PerLayer(Krum()),
    MultiKrum(),
    ARC(GeometricMedian()),
    Bucketing(GeometricMedian()),
]
BYZANTINE, MOST_BYZANTINE = [1, 4, 5], 4
# With those arguments without which they can't be made, or would do little.
ATTACKS: list[Attack] = [
    attacks.ALittleIsEnough(),
    attacks.ALittleIsEnough(z=3.0),
    attacks.Alternating(),
    attacks.BitFlip(bit=62),
    attacks.Fang(),
    attacks.Framing(attacks.SignFlip(), start=2),
    attacks.GaussianNoise(std=3.0),
    attacks.HonestRadius(),
    attacks.InnerProductManipulation(),
    attacks.Intermittent(attacks.SignFlip(), probability=0.5),
    attacks.Mimic(0),
    attacks.MinMax(),
    attacks.MinSum(),
    attacks.NonFinite(),
    attacks.OneLayer(),
    attacks.OptimalALittleIsEnough(),
    attacks.OptimalInnerProductManipulation(),
    attacks.RelocatedOrthogonalPerturbation(),
    attacks.Scale(10.0),
    attacks.SignFlip(),
    attacks.StaleGradient(1),
    attacks.Zero(),
]


def honest(kind: str, step: int, m: int = 9, d: int = 330) -> Tensor:
    """Return rows of one step: noise about a mean; of sizes or with means of their own."""
    noise = torch.randn(m, d, generator=torch.Generator().manual_seed(step), dtype=torch.float64)
    own = torch.randn(m, d, generator=torch.Generator().manual_seed(100), dtype=torch.float64)
    if kind == "sizes":
        noise *= own[:, :1].exp()
    return noise + 0.3 * own[0] + (own if kind == "means" else 0)


def check_holds(rule: Aggregator, attack: Attack, kind: str) -> None:
    rule.reset()
    attack, segments = copy.deepcopy(attack), Segments.of_sizes([130, 200])
    attack.bind(rule, MOST_BYZANTINE)
    for step in range(3):
        matrix = WorkerMatrix([honest(kind, step)], segments=segments)
        decision = rule.decide(attack.tamper(matrix, BYZANTINE), MOST_BYZANTINE)
        error = honest(kind, step)[[0, 2, 3, 6, 7, 8]].mean(0) - decision.values()[0]
        for liars in ([], BYZANTINE):
            bound = decision.report().certificate(liars)
            assert bound is not None and float(error.norm()) <= bound * ROUNDING + 1e-9


@pytest.mark.parametrize("attack", ATTACKS, ids=name_of)
def test_holds_under_every_attack(attack: Attack) -> None:
    check_holds(PersistentFilter(), attack, "sizes")


@pytest.mark.parametrize("rule", RULES, ids=name_of)
def test_holds_for_every_rule_that_combines_rows(rule: Aggregator) -> None:
    for attack in (attacks.SignFlip(), attacks.Mimic(0), attacks.ALittleIsEnough(z=3.0), attacks.NonFinite()):
        check_holds(rule, attack, "sizes")


@pytest.mark.slow
@pytest.mark.parametrize("rule", RULES, ids=name_of)
def test_holds_for_all_rules_under_every_attack(rule: Aggregator, subtests: pytest.Subtests) -> None:
    for attack, kind in zip(ATTACKS, cycle(["equal", "sizes", "means"])):
        with subtests.test(attack=attack, kind=kind):
            check_holds(rule, attack, kind)


def report_of(rule: Aggregator, rows: Tensor, f: int) -> Report:
    return rule.decide(WorkerMatrix([rows]), f).report()


def test_rules_that_do_not_know_distances_from_the_aggregate_have_none() -> None:
    rows, _ = drawn(7, 40, seed=1)
    for rule in (Mean(), CoordinateWiseMedian(), PerLayer(CoordinateWiseMedian())):
        assert report_of(rule, rows, 2).certificate() is None
    assert Report.of_breakdown([1], num_workers=7).certificate() is None


def test_a_dropped_row_is_a_liars() -> None:
    rows, _ = drawn(7, 40, seed=2)
    dropped = attacks.NonFinite()(rows, [2, 3])
    others = [0, 1, 4, 5, 6]
    for rule in (CTMA(GeometricMedian()), PersistentFilter()):
        rule.reset()
        expected = report_of(rule, rows[others], 1).certificate()
        rule.reset()
        assert report_of(rule, dropped, 3).certificate() == pytest.approx(expected)


def test_known_liars_lower_the_bound() -> None:
    rows, _ = drawn(7, 40, seed=3)
    rows[2] *= 1000
    report = report_of(GeometricMedian(), rows, 2)
    whole, apart = report.certificate(), report.certificate(liars=[2])
    assert whole is not None and apart is not None and whole > 100 and apart < 10
    assert report.certificate(liars=[2, 2]) == apart
    assert report.certificate(liars=[2, 3]) is not None
    assert report.certificate(liars=[2, 3, 4]) is None  # more than there may be


def test_without_liars_it_is_the_distance_from_the_mean() -> None:
    rows, _ = drawn(7, 40, seed=4)
    median = GeometricMedian()(rows, num_byzantine=0)
    assert report_of(GeometricMedian(), rows, 0).certificate() == pytest.approx(float((rows.mean(0) - median).norm()))
