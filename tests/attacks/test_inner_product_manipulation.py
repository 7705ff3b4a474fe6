import attack_oracles
import torch
from cases import AttackCase
from vectors import rows

from lightning_byzantine.attacks import InnerProductManipulation

CASES = [
    AttackCase(
        InnerProductManipulation(),
        lambda honest, own: [attack_oracles.inner_product_manipulation(honest, 0.5)] * len(own),
    )
]


def test_inner_product_manipulation_against_a_loop() -> None:
    vectors = rows().double()
    mean = sum(vectors[i] for i in (0, 1, 2, 5, 6)) / 5
    forged = InnerProductManipulation(epsilon=0.7)(vectors, [3, 4])
    torch.testing.assert_close(forged[3], -0.7 * mean)
    assert torch.equal(forged[3], forged[4])
