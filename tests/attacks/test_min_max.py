import attack_oracles
import pytest
import torch
from cases import AttackCase
from hypothesis import given
from hypothesis import strategies as st
from vectors import honest_rows, rows

from lightning_byzantine.attacks import MinMax

PERTURBATIONS = ["std", "unit", "sign"]


CASES = [
    AttackCase(
        MinMax(perturbation),
        lambda honest, own, perturbation=perturbation: [attack_oracles.min_max(honest, perturbation)] * len(own),
        name=f"MinMax, {perturbation}",
    )
    for perturbation in PERTURBATIONS
]


@pytest.mark.parametrize("offset", [0.0, 1e4])
@pytest.mark.parametrize("scale", [1e-6, 1.0, 1e6])
@pytest.mark.parametrize("m", [2, 3, 7, 12])
@pytest.mark.parametrize("perturbation", PERTURBATIONS)
def test_min_max_against_a_bisection(perturbation: str, m: int, scale: float, offset: float) -> None:
    vectors = scale * (rows(m, 20).double() + offset)
    forged = MinMax(perturbation)(vectors, [0])[0]
    expected = torch.from_numpy(attack_oracles.min_max(honest_rows(vectors, [0]), perturbation))
    torch.testing.assert_close(forged, expected, rtol=1e-9, atol=1e-6 * scale)


@given(
    data=st.lists(st.lists(st.integers(-3, 3), min_size=2, max_size=2), min_size=2, max_size=6),
    perturbation=st.sampled_from(PERTURBATIONS),
)
def test_min_max_goes_to_the_edge_and_no_further(data: list[list[int]], perturbation: str) -> None:
    vectors = torch.tensor(data, dtype=torch.float64)
    honest = vectors[1:]
    forged = MinMax(perturbation)(vectors, [0])[0]
    mean = honest.mean(0)
    widest = (honest[:, None] - honest).norm(dim=2).max()
    reach = (honest - forged).norm(dim=1).max()
    assert reach <= widest + 1e-9
    if not torch.equal(forged, mean):
        assert (honest - (forged + 1e-3 * (forged - mean))).norm(dim=1).max() > widest


@pytest.mark.parametrize("perturbation", PERTURBATIONS)
def test_min_max_sends_the_mean_where_there_is_no_way_to_go(perturbation: str) -> None:
    assert torch.equal(MinMax(perturbation)(torch.ones(4, 3), [0]), torch.ones(4, 3))
    assert torch.equal(MinMax(perturbation)(torch.zeros(4, 3), [0]), torch.zeros(4, 3))
