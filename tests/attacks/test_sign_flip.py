import torch
from cases import AttackCase
from vectors import rows

from lightning_byzantine.attacks import SignFlip

CASES = [AttackCase(SignFlip(), lambda honest, own: [-row for row in own])]


def test_sign_flip_sends_the_opposite_of_its_own() -> None:
    assert torch.equal(SignFlip()(rows(), [1])[1], -rows()[1])
