import numpy as np
import torch
from cases import AttackCase
from vectors import rows

from lightning_byzantine.attacks import Scale, Zero

CASES = [AttackCase(Zero(), lambda honest, own: [np.zeros_like(row) for row in own])]


def test_zero_and_scale_by_their_names() -> None:
    assert torch.equal(Zero()(rows(), [3])[3], torch.zeros(40))
    assert torch.equal(Scale(factor=2.5)(rows(), [3])[3], 2.5 * rows()[3])
