import copy

import numpy as np
import oracles
import pytest
import torch
from cases import Exempt, RuleCase
from exemptions import ITERATIVE
from vectors import as_list, relative_error, workers

from lightning_byzantine.aggregators import (
    CAF,
    CTMA,
    Aggregator,
    Bucketing,
    CoordinateWiseMedian,
    GeometricMedian,
    Krum,
    MultiKrum,
    PersistentFilter,
)
from lightning_byzantine.utilities.rng import StepSeed


def in_buckets(base: oracles.Oracle, size: int | None = None, seed: int = 0) -> oracles.Oracle:
    """The first call: buckets are drawn by the seed, everything else is done in loops."""

    def rule(rows: oracles.Rows, f: int) -> np.ndarray:
        m = len(rows)
        step = size or max(s for s in range(1, m + 1) if s * 2 * f <= m and -(-m // s) > 2 * f)
        shuffled = [rows[i] for i in torch.randperm(m, generator=StepSeed(seed).next()).tolist()]
        return base([oracles.mean(shuffled[start : start + step], f) for start in range(0, m, step)], f)

    return rule


BY_INDEX = Exempt(["permutation"], because="the buckets are drawn by index")


CASES = [
    RuleCase(Bucketing(CoordinateWiseMedian()), in_buckets(oracles.coordinate_wise_median), [BY_INDEX]),
    RuleCase(
        CTMA(Bucketing(CoordinateWiseMedian())), oracles.ctma(in_buckets(oracles.coordinate_wise_median)), [BY_INDEX]
    ),
    RuleCase(Bucketing(CAF()), in_buckets(oracles.caf), [BY_INDEX, ITERATIVE]),
]


@pytest.mark.parametrize("m", range(1, 40))
def test_bucketing_works_at_its_defaults_for_any_m_and_f(m: int, subtests: pytest.Subtests) -> None:
    for f in range((m + 1) // 2):
        with subtests.test(f=f):
            rule = Bucketing(CoordinateWiseMedian())
            rule.check(m, f)
            rows = torch.ones(m, 2)
            rows[:f] = 1e6
            torch.testing.assert_close(rule(rows, num_byzantine=f), torch.ones(2))


@pytest.mark.parametrize(("m", "f", "size"), [(12, 2, 2), (13, 2, 3), (7, 1, None), (9, 4, None), (8, 2, None)])
@pytest.mark.parametrize(
    ("base", "oracle"),
    [
        (CoordinateWiseMedian(), oracles.coordinate_wise_median),
        (Krum(), oracles.krum),
        (CTMA(CoordinateWiseMedian()), oracles.ctma(oracles.coordinate_wise_median)),
        (GeometricMedian(), oracles.geometric_median),
    ],
    ids=["median", "krum", "ctma(median)", "geometric median"],
)
def test_bucketing_against_a_loop(base: Aggregator, oracle: oracles.Oracle, m: int, f: int, size: int | None) -> None:
    rows = workers(m, 20, seed=m)
    expected = in_buckets(oracle, size, seed=5)(as_list(rows), f)
    actual = Bucketing(base, bucket_size=size, seed=5)(rows, num_byzantine=f)
    assert relative_error(actual, expected, rows) < 1e-5


def test_bucketing_draws_anew_and_resumes() -> None:
    rows = workers(12, 5, seed=0)
    rule, twin = (Bucketing(CoordinateWiseMedian(), bucket_size=2, seed=3) for _ in range(2))
    results = [rule(rows, 2) for _ in range(4)]
    assert not torch.equal(results[0], results[1])
    assert torch.equal(twin(rows, 2), results[0])
    assert not torch.equal(Bucketing(CoordinateWiseMedian(), bucket_size=2, seed=4)(rows, 2), results[0])
    state = copy.deepcopy(twin.state_dict())
    other = Bucketing(CoordinateWiseMedian(), bucket_size=2, seed=3)
    other.load_state_dict(state)
    assert torch.equal(other(rows, 2), results[1])


def test_fewer_buckets_are_left_when_rows_are_dropped() -> None:
    rows = torch.ones(7, 2)
    rows[0] = torch.nan
    rule = Bucketing(MultiKrum(num_selected=3))
    for bad in (1e6, torch.nan):
        rows[1] = bad
        assert torch.equal(rule(rows, num_byzantine=2), torch.ones(2))


def test_bucketing_refuses_too_few_buckets() -> None:
    with pytest.raises(ValueError, match="more than 2f buckets, got bucket_size=3, which makes 2 buckets of m=5"):
        CTMA(Bucketing(Krum(), bucket_size=3))(torch.zeros(5, 2), 1)
    with pytest.raises(ValueError, match="bucket_size must be at least 1, got 0"):
        Bucketing(Krum(), bucket_size=0)
    with pytest.raises(ValueError, match="seed must be at least 0, got -1"):
        Bucketing(Krum(), seed=-1)


@pytest.mark.parametrize("base", [PersistentFilter(), CTMA(PersistentFilter())], ids=["itself", "in another"])
def test_random_buckets_have_no_history(base: Aggregator) -> None:
    with pytest.raises(ValueError, match="base must not be PersistentFilter nor contain it: random buckets have no"):
        Bucketing(base)
