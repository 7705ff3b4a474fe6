from copy import deepcopy
from typing import Any

import attack_oracles
import oracles
import pytest
import torch
from cases import AttackCase, AttackOracle
from vectors import honest_rows, rows

from lightning_byzantine.aggregators import (
    CTMA,
    NNM,
    Aggregator,
    Bucketing,
    CenteredClipping,
    CoordinateWiseMedian,
    CoordinateWiseTrimmedMean,
    Krum,
    Mean,
    PersistentFilter,
)
from lightning_byzantine.attacks import (
    ALittleIsEnough,
    Attack,
    InnerProductManipulation,
    OptimalALittleIsEnough,
    OptimalInnerProductManipulation,
)
from lightning_byzantine.matrix import WorkerMatrix

RULES: dict[str, tuple[Aggregator, oracles.Oracle]] = {
    "mean": (Mean(), oracles.mean),
    "median": (CoordinateWiseMedian(), oracles.coordinate_wise_median),
    "trimmed mean": (CoordinateWiseTrimmedMean(), oracles.coordinate_wise_trimmed_mean),
    "krum": (Krum(), oracles.krum),
    "ctma(nnm(median))": (
        CTMA(NNM(CoordinateWiseMedian())),
        oracles.ctma(oracles.nnm(oracles.coordinate_wise_median)),
    ),
}


def searched(rule: oracles.Oracle, forge: attack_oracles.Forge, evaluations: int) -> AttackOracle:
    return lambda honest, own: [attack_oracles.optimal(honest, len(own), rule, forge, 1.0, evaluations)] * len(own)


CASES = [
    AttackCase(
        OptimalALittleIsEnough(RULES["ctma(nnm(median))"][0], evaluations=4),
        searched(RULES["ctma(nnm(median))"][1], attack_oracles.a_little_is_enough, 4),
    ),
    AttackCase(
        OptimalALittleIsEnough(CoordinateWiseMedian(), num_byzantine=0),
        searched(oracles.coordinate_wise_median, attack_oracles.a_little_is_enough, 20),
        name="OptimalALittleIsEnough on the median",
    ),
    AttackCase(
        OptimalInnerProductManipulation(CoordinateWiseMedian(), num_byzantine=3, evaluations=5),
        searched(oracles.coordinate_wise_median, attack_oracles.inner_product_manipulation, 5),
    ),
    AttackCase(
        OptimalInnerProductManipulation(CoordinateWiseMedian(), num_byzantine=0),
        searched(oracles.coordinate_wise_median, attack_oracles.inner_product_manipulation, 20),
        name="OptimalInnerProductManipulation, 20 trials",
    ),
]


@pytest.mark.parametrize("evaluations", [2, 20])
@pytest.mark.parametrize("name", RULES)
def test_optimal_attacks_against_a_loop(name: str, evaluations: int) -> None:
    rule, oracle_of_rule = RULES[name]
    vectors = 0.5 + rows(9, 6).double()
    honest, f = honest_rows(vectors, [5, 6, 7, 8]), 4
    for attack, forge in (
        (OptimalALittleIsEnough(rule, evaluations=evaluations), attack_oracles.a_little_is_enough),
        (OptimalInnerProductManipulation(rule, evaluations=evaluations), attack_oracles.inner_product_manipulation),
    ):
        expected = attack_oracles.optimal(honest, f, oracle_of_rule, forge, 1.0, evaluations)
        torch.testing.assert_close(attack(vectors, [5, 6, 7, 8])[5], torch.from_numpy(expected))


@pytest.mark.parametrize("rule", [rule for rule, _ in RULES.values()], ids=RULES)
def test_optimal_attacks_do_at_least_the_harm_of_what_they_tried(rule: Aggregator) -> None:
    vectors, byzantine = 0.5 + rows(9, 30), [0, 3, 4, 8]
    mean = vectors[[1, 2, 5, 6, 7]].mean(0)

    def harm(attack: Attack) -> float:
        return float((rule(attack(vectors, byzantine), num_byzantine=4) - mean).norm())

    most = harm(OptimalALittleIsEnough(rule))
    assert all(most >= harm(ALittleIsEnough(z=z)) - 1e-6 for z in (1.0, 1e-12))
    most = harm(OptimalInnerProductManipulation(rule))
    assert all(most >= harm(InnerProductManipulation(epsilon)) - 1e-6 for epsilon in (0.0, 1.0))


class Counting(Aggregator):
    """Moves by one at every call, and counts the calls, of copies too."""

    calls = 0

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("position", torch.zeros(()))

    def locate(self, matrix: WorkerMatrix, num_byzantine: int) -> Any:
        Counting.calls += 1
        self.position += 1
        return matrix.mean()


def test_a_line_search_leaves_the_rule_as_it_was_and_runs_it_as_often_as_said() -> None:
    rule = Counting()
    attack = OptimalInnerProductManipulation(rule, evaluations=7)
    before = Counting.calls
    attack(rows(), [0])
    assert Counting.calls - before == 7
    assert rule.position == 0
    assert attack.state_dict() == {}

    bucketing, twin = (Bucketing(CoordinateWiseMedian(), seed=3) for _ in range(2))
    vectors = OptimalALittleIsEnough(bucketing)(rows(), [0])
    assert torch.equal(bucketing(vectors, num_byzantine=1), twin(vectors, num_byzantine=1))


@pytest.mark.parametrize("rule", [CenteredClipping(), PersistentFilter()], ids=repr)
def test_a_line_search_does_not_disturb_what_a_rule_remembers(rule: Aggregator) -> None:
    rule, twin, attack = deepcopy(rule), deepcopy(rule), OptimalALittleIsEnough(rule, evaluations=5)
    for step in range(4):
        forged = attack(rows() + step, [0, 3])
        assert torch.equal(rule(forged, num_byzantine=2), twin(forged, num_byzantine=2))
    assert str(rule.state_dict()) == str(twin.state_dict())
    assert attack.state_dict() == {}


def test_a_line_search_needs_a_rule_that_can_serve() -> None:
    with pytest.raises(ValueError, match=r"aggregator must be given .* OptimalALittleIsEnough\(aggregator=\.\.\.\)"):
        OptimalALittleIsEnough()(rows(), [0])
    with pytest.raises(ValueError, match="num_byzantine must satisfy 0 <= f < m / 2, got f=4 with m=7"):
        OptimalALittleIsEnough(Krum())(rows(), [0, 1, 2, 3])
    attack = OptimalInnerProductManipulation()
    attack.bind(Krum(), num_byzantine=2)
    assert attack(rows(), [0]).isfinite().all()
    with pytest.raises(TypeError, match=r"aggregator must be an Aggregator, such as Krum\(\), got 'Krum'"):
        OptimalALittleIsEnough("Krum")
    with pytest.raises(ValueError, match="evaluations must be at least 2, got 1"):
        OptimalALittleIsEnough(Krum(), evaluations=1)
    with pytest.raises(ValueError, match="step must not be 0"):
        OptimalALittleIsEnough(Krum(), step=0.0)
    with pytest.raises(ValueError, match="step must be finite and above 0, got -1"):
        OptimalInnerProductManipulation(Krum(), step=-1.0)
    with pytest.raises(ValueError, match="num_byzantine must be at least 0, got -1"):
        OptimalALittleIsEnough(Krum(), num_byzantine=-1)


def test_a_line_search_does_not_stop_the_training() -> None:
    # Three colluders, of which the rule is told to expect one: overflowing together would break it down.
    attack = OptimalInnerProductManipulation(Mean(), num_byzantine=1, evaluations=20, step=1e30)
    vectors = rows()
    assert attack(vectors, [0, 1, 2]).isfinite().all()
    assert Mean()(attack(vectors, [0, 1, 2]), num_byzantine=1).isfinite().all()
