import attack_oracles
import pytest
import torch
from cases import AttackCase
from vectors import honest_rows, rows

from lightning_byzantine.attacks import MinMax, MinSum

PERTURBATIONS = ["std", "unit", "sign"]


CASES = [
    AttackCase(
        MinSum(perturbation),
        lambda honest, own, perturbation=perturbation: [attack_oracles.min_sum(honest, perturbation)] * len(own),
        name=f"MinSum, {perturbation}",
    )
    for perturbation in PERTURBATIONS
]


@pytest.mark.parametrize("m", [3, 7, 12])
@pytest.mark.parametrize("perturbation", PERTURBATIONS)
def test_min_sum_against_a_bisection(perturbation: str, m: int) -> None:
    vectors = 1e3 + rows(m, 20).double()
    forged = MinSum(perturbation)(vectors, [0])[0]
    expected = torch.from_numpy(attack_oracles.min_sum(honest_rows(vectors, [0]), perturbation))
    torch.testing.assert_close(forged, expected, rtol=1e-9, atol=1e-6)


@pytest.mark.parametrize("perturbation", PERTURBATIONS)
def test_min_sum_hides_better_than_min_max(perturbation: str) -> None:
    vectors, mean = rows(9, 50), rows(9, 50)[2:].mean(0)
    moved = [(attack(perturbation)(vectors, [0, 1])[0] - mean).norm() for attack in (MinSum, MinMax)]
    assert 0 < moved[0] < moved[1]


@pytest.mark.parametrize("perturbation", PERTURBATIONS)
def test_min_sum_sends_the_mean_where_there_is_no_way_to_go(perturbation: str) -> None:
    assert torch.equal(MinSum(perturbation)(torch.ones(4, 3), [0]), torch.ones(4, 3))
    with pytest.raises(ValueError, match="perturbation must be one of std, unit, sign, got 'mean'"):
        MinSum("mean")
