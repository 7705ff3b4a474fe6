import attack_oracles
import pytest
import torch
from cases import AttackCase
from vectors import rows

from lightning_byzantine.attacks import HonestRadius

CASES = [
    AttackCase(
        HonestRadius(factor),
        lambda honest, own, factor=factor: [attack_oracles.against_the_mean(honest, factor)] * len(own),
        name=f"HonestRadius, {factor}",
    )
    for factor in (1.0, 2.5)
]


def test_no_honest_row_need_be_nearer_to_the_mean_than_the_forged_ones() -> None:
    vectors = rows(9, 200)
    honest, forged = vectors[:6], HonestRadius()(vectors, [6, 7, 8])[6:]
    mean = honest.mean(0)
    distances = (honest - mean).norm(dim=1)
    assert distances.min() < (forged - mean).norm(dim=1).min()
    assert (forged - mean).norm(dim=1).max() < distances.max()
    assert (forged @ mean < 0).all(), "with this much noise, the forged rows point uphill"


def test_the_mean_is_sent_where_there_is_no_way_to_go() -> None:
    assert torch.equal(HonestRadius()(torch.ones(4, 3), [0]), torch.ones(4, 3))
    around_zero = torch.tensor([[1.0], [-1.0], [9.0]])
    assert HonestRadius()(around_zero, [2])[2] == 0


def test_the_factor_is_checked() -> None:
    with pytest.raises(ValueError, match="factor must be finite and at least 0, got -1"):
        HonestRadius(factor=-1)
