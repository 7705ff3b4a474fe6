"""What published codes send, number by number, and which attack of ours sends it.

Four honest workers, and two Byzantine ones if not said otherwise. Each value stands here as its library prints it,
comes out of an oracle written from the formula, and comes out of the attack.
"""

from collections.abc import Callable
from statistics import NormalDist

import attack_oracles
import numpy as np
import oracles
import pytest
import torch

from lightning_byzantine.aggregators import (
    Aggregator,
    CoordinateWiseMedian,
    CoordinateWiseTrimmedMean,
    Krum,
    Mean,
)
from lightning_byzantine.attacks import (
    ALittleIsEnough,
    InnerProductManipulation,
    LabelFlip,
    Mimic,
    MinMax,
    OptimalALittleIsEnough,
    OptimalInnerProductManipulation,
    Scale,
    SignFlip,
    VectorAttack,
)

HONEST = [[1.0, -2.0, 0.5], [2.0, 0.0, 0.25], [4.0, 1.0, -1.0], [3.0, -1.0, 2.0]]
ROWS = [np.array(row) for row in HONEST]
OWN = [-3.0, 1.5, 4.0]


def sent(attack: VectorAttack, num_byzantine: int = 2) -> list[float]:
    """Return what the first Byzantine worker sends, after the honest ones."""
    vectors = torch.tensor(HONEST + num_byzantine * [OWN], dtype=torch.float64)
    return attack(vectors, byzantine=list(range(4, 4 + num_byzantine)))[4].tolist()


def quantile_of_byzpy(m: int, f: int) -> float:
    supporters = m // 2 + 1 - f
    return NormalDist().inv_cdf((m - supporters) / m)


def quantile_of_the_paper(m: int, f: int) -> float:
    supporters = m // 2 + 1 - f
    return NormalDist().inv_cdf((m - f - supporters) / (m - f))


# Of n honest workers, the deviation with ddof 0 is that with ddof 1 times the root of (n - 1) / n.
DDOF_0 = (3 / 4) ** 0.5

SENT: dict[str, tuple[VectorAttack, Callable[[], np.ndarray], list[float], int]] = {
    "ByzFL SignFlipping": (
        InnerProductManipulation(epsilon=1.0),
        lambda: -attack_oracles.honest_mean(ROWS),
        [-2.5, 0.5, -0.4375],
        2,
    ),
    "ByzFL InnerProductManipulation": (
        InnerProductManipulation(epsilon=2.0),
        lambda: attack_oracles.inner_product_manipulation(ROWS, 2.0),
        [-5.0, 1.0, -0.875],
        2,
    ),
    "ByzFL ALittleIsEnough": (
        ALittleIsEnough(z=-1.5),
        lambda: attack_oracles.a_little_is_enough(ROWS, -1.5, ddof=1),
        [4.43649167, 1.43649167, 2.28416084],
        2,
    ),
    "ByzFL Mimic": (Mimic(), lambda: ROWS[0], [1.0, -2.0, 0.5], 2),
    "ByzFL Mimic(epsilon=2)": (Mimic(worker=2), lambda: ROWS[2], [4.0, 1.0, -1.0], 2),
    "ByzPy EmpireAttack": (
        InnerProductManipulation(epsilon=1.0),
        lambda: attack_oracles.inner_product_manipulation(ROWS, 1.0),
        [-2.5, 0.5, -0.4375],
        2,
    ),
    "ByzPy LittleAttack(f=2)": (
        ALittleIsEnough(z=-DDOF_0 * quantile_of_byzpy(m=6, f=2)),
        lambda: attack_oracles.a_little_is_enough(ROWS, -quantile_of_byzpy(m=6, f=2), ddof=0),
        [2.9816, -0.0184, 0.8967],
        2,
    ),
    "ByzPy LittleAttack(f=3)": (
        ALittleIsEnough(z=-DDOF_0 * quantile_of_byzpy(m=7, f=3)),
        lambda: attack_oracles.a_little_is_enough(ROWS, -quantile_of_byzpy(m=7, f=3), ddof=0),
        [3.6936, 0.6936, 1.5757],
        3,
    ),
    "ByzPy SignFlipAttack": (SignFlip(), lambda: -np.array(OWN), [3.0, -1.5, -4.0], 2),
    "ByzPy SignFlipAttack(scale=-4)": (Scale(factor=-4.0), lambda: -4 * np.array(OWN), [12.0, -6.0, -16.0], 2),
    "ByzPy MimicAttack": (Mimic(), lambda: ROWS[0], [1.0, -2.0, 0.5], 2),
    "the paper's code, sign flip": (SignFlip(), lambda: -np.array(OWN), [3.0, -1.5, -4.0], 2),
    "the paper's code, IPM": (
        InnerProductManipulation(),
        lambda: attack_oracles.inner_product_manipulation(ROWS, 0.5),
        [-1.25, 0.25, -0.21875],
        2,
    ),
    "the paper's code, ALIE": (
        ALittleIsEnough(),
        lambda: attack_oracles.a_little_is_enough(ROWS, quantile_of_the_paper(m=7, f=3), ddof=1),
        [1.6293, -1.3707, -0.3929],
        3,
    ),
}


@pytest.mark.parametrize("name", SENT)
def test_vectors_that_published_codes_send(name: str) -> None:
    attack, oracle, expected, num_byzantine = SENT[name]
    assert oracle().tolist() == pytest.approx(expected, abs=1e-4)
    assert sent(attack, num_byzantine) == pytest.approx(oracle().tolist(), abs=1e-12)


RULES: dict[str, tuple[Aggregator, oracles.Oracle]] = {
    "Median": (CoordinateWiseMedian(), oracles.coordinate_wise_median),
    "TrMean": (CoordinateWiseTrimmedMean(), oracles.coordinate_wise_trimmed_mean),
    "Krum": (Krum(), oracles.krum),
    "Average": (Mean(), oracles.mean),
}
# ByzFL's Optimal_InnerProductManipulation and Optimal_ALittleIsEnough with pre_agg_list=[], f=2: its first step is 10,
# and it looks for its z on the other side of the mean.
OPTIMAL = {
    ("IPM", "Median"): [-25.0, 5.0, -4.375],
    ("IPM", "TrMean"): [-25.0, 5.0, -4.375],
    ("IPM", "Krum"): [-0.7036874417766406, 0.14073748835532812, -0.12314530231091211],
    ("IPM", "Average"): [-13107175.0, 2621435.0, -2293755.625],
    ("ALIE", "Median"): [15.409944487358056, 12.409944487358056, 12.748572252245129],
    ("ALIE", "TrMean"): [15.409944487358056, 12.409944487358056, 12.748572252245129],
    ("ALIE", "Krum"): [15.409944487358056, 12.409944487358056, 12.748572252245129],
    ("ALIE", "Average"): [6768518.565443493, 6768515.565443493, 6454535.575412842],
}


@pytest.mark.parametrize(("kind", "rule"), OPTIMAL)
def test_what_byzfl_finds_by_its_line_search(kind: str, rule: str) -> None:
    aggregator, oracle_of_rule = RULES[rule]
    attack: VectorAttack
    if kind == "IPM":
        attack = OptimalInnerProductManipulation(aggregator, step=10.0)
        forge, step = attack_oracles.inner_product_manipulation, 10.0
    else:
        attack = OptimalALittleIsEnough(aggregator, step=-10.0)
        forge, step = attack_oracles.a_little_is_enough, -10.0
    oracle = attack_oracles.optimal(ROWS, 2, oracle_of_rule, forge, step)
    assert oracle.tolist() == pytest.approx(OPTIMAL[kind, rule], rel=1e-9)
    assert sent(attack) == pytest.approx(OPTIMAL[kind, rule], rel=1e-9)


@pytest.mark.parametrize("perturbation", ["std", "unit", "sign"])
def test_min_max_as_its_papers_code_searches_it(perturbation: str) -> None:
    deviation = {
        "std": attack_oracles.deviation(ROWS, 1),
        "unit": attack_oracles.honest_mean(ROWS) / np.linalg.norm(attack_oracles.honest_mean(ROWS)),
        "sign": np.sign(attack_oracles.honest_mean(ROWS)),
    }[perturbation]
    mean = attack_oracles.honest_mean(ROWS)
    widest = max(np.linalg.norm(row - other) for row in ROWS for other in ROWS)
    # lambda starts at 10 and moves by 5, 2.5, ... up or down, until it changes by less than 1e-5.
    trial, hidden, move = 10.0, 0.0, 10.0
    while abs(hidden - trial) > 1e-5:
        if max(np.linalg.norm(row - (mean - trial * deviation)) for row in ROWS) <= widest:
            hidden, trial = trial, trial + move / 2
        else:
            trial -= move / 2
        move /= 2
    assert sent(MinMax(perturbation)) == pytest.approx((mean - hidden * deviation).tolist(), abs=1e-4)


def test_labels_that_all_codes_flip_alike() -> None:
    labels = torch.tensor([0, 1, 5, 9])
    byzfl, byzpy, paper = labels.sub(10 - 1).mul(-1), 10 - 1 - labels, 9 - labels
    poisoned = LabelFlip(num_classes=10).poison((torch.zeros(4), labels))[1].tolist()
    assert poisoned == byzfl.tolist() == byzpy.tolist() == paper.tolist() == [9, 8, 4, 0]
