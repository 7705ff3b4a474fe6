import pytest
import torch
from cases import AttackCase, Exempt
from vectors import rows

from lightning_byzantine.aggregators import Krum
from lightning_byzantine.attacks import Alternating, Framing, LabelFlip, Mimic, OptimalALittleIsEnough, SignFlip

ORDER = Exempt(["permutation"], because="whom the crowd is around depends on the order")
CASES = [
    AttackCase(Framing(SignFlip()), lambda honest, own: [honest[0] + 0.2 * (row - honest[0]) for row in own], [ORDER]),
    AttackCase(
        Framing(Alternating(), start=3, distance=0.5),
        lambda honest, own: [(honest[0] + row) / 2 for row in own],
        [ORDER],
    ),
    AttackCase(Framing(SignFlip(), start=0), lambda honest, own: [-row for row in own], name="Framing, at once"),
]


def test_the_attack_begins_after_some_steps_of_a_crowd() -> None:
    attack = Framing(SignFlip(), start=5)
    for step in range(8):
        vectors = rows() + step
        sent = attack(vectors, [0, 2, 3])[[0, 2, 3]]
        if step < 5:
            crowd = torch.cat([sent, vectors[1:2]])
            assert torch.pdist(crowd).max() < torch.pdist(vectors[[1, 4, 5, 6]]).min()
        else:
            assert torch.equal(sent, -vectors[[0, 2, 3]])


def test_is_checked_as_what_it_wraps() -> None:
    with pytest.raises(ValueError, match="worker must be an honest one"):
        Framing(Mimic(worker=0))(rows(), [0])
    attack = Framing(OptimalALittleIsEnough(), start=0)
    attack.bind(Krum(), num_byzantine=1)
    assert torch.equal(attack(rows(), [0]), OptimalALittleIsEnough(Krum())(rows(), [0]))
    for wrong in ("SignFlip", LabelFlip(num_classes=10)):
        with pytest.raises(TypeError, match=r"attack must be an Attack on vectors, such as SignFlip\(\), got"):
            Framing(wrong)
    with pytest.raises(ValueError, match="start must be at least 0, got -1"):
        Framing(SignFlip(), start=-1)
    with pytest.raises(ValueError, match=r"distance must be in \[0, 1\], got 2"):
        Framing(SignFlip(), distance=2)
