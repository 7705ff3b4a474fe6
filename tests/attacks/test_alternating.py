import attack_oracles
import pytest
import torch
from cases import AttackCase, Exempt
from vectors import as_list, rows

from lightning_byzantine.aggregators import CTMA, NNM, GeometricMedian
from lightning_byzantine.attacks import Alternating

ORDER = Exempt(["permutation"], because="which side is first depends on the order")
CASES = [
    AttackCase(
        Alternating(),
        lambda honest, own: [attack_oracles.beside_the_farthest_pair(honest, 1.0)] * len(own),
        [ORDER],
    ),
    AttackCase(
        Alternating(factor=0.3),
        lambda honest, own: [attack_oracles.beside_the_farthest_pair(honest, 0.3)] * len(own),
        [ORDER],
        name="Alternating, 0.3",
    ),
]


def test_sides_change_in_every_step() -> None:
    attack, mean = Alternating(factor=2.0), rows()[1:].mean(0)
    for sign in (1, -1, 1, -1, 1):
        expected = torch.from_numpy(attack_oracles.beside_the_farthest_pair(as_list(rows()[1:]), sign * 2.0)).float()
        torch.testing.assert_close(attack(rows(), [0])[0], expected)
        assert not torch.allclose(expected, mean)


def test_the_result_of_a_rule_that_selects_moves_with_it() -> None:
    vectors, attack, rule = rows(9, 300), Alternating(), CTMA(NNM(GeometricMedian()))
    results = [rule(attack(vectors, [5, 6, 7, 8]), num_byzantine=4) for _ in range(2)]
    alone = rule(vectors[:5], num_byzantine=0)
    assert (results[0] - results[1]).norm() > 0.5 * (vectors[:5] - alone).norm(dim=1).median()


def test_the_factor_is_checked() -> None:
    with pytest.raises(ValueError, match="factor must be finite and at least 0"):
        Alternating(factor=-0.5)
