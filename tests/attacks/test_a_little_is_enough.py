import warnings

import attack_oracles
import pytest
import torch
from cases import AttackCase
from vectors import rows

from lightning_byzantine.attacks import ALittleIsEnough

CASES = [
    AttackCase(
        ALittleIsEnough(z=1.0),
        lambda honest, own: [attack_oracles.a_little_is_enough(honest, 1.0)] * len(own),
    )
]


@pytest.mark.parametrize(("m", "f", "z"), [(17, 8, 1.2206), (5, 2, 0.4307), (9, 4, 0.8416)])
def test_a_little_is_enough_against_a_loop(m: int, f: int, z: float) -> None:
    vectors = rows(m).double()
    forged = ALittleIsEnough()(vectors, list(range(f)))
    for column in range(5):
        honest = vectors[f:, column].tolist()
        mean = sum(honest) / len(honest)
        deviation = (sum((value - mean) ** 2 for value in honest) / (len(honest) - 1)) ** 0.5
        assert float(forged[0, column]) == pytest.approx(mean - z * deviation, abs=1e-4)


def test_a_little_is_enough_says_when_it_is_not() -> None:
    with pytest.warns(UserWarning, match=r"z=0.00 with 1 of 3 workers, which does no harm"):
        ALittleIsEnough()(rows(3), [0])
    with pytest.raises(ValueError, match=r"z must be given .* got z=None with 1 of 2 workers"):
        ALittleIsEnough()(rows(2), [0])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert torch.equal(ALittleIsEnough(z=2.0)(rows(2), [0])[0], rows(2)[1])  # one honest row has no deviation
    with pytest.raises(ValueError, match="z must be finite, got inf"):
        ALittleIsEnough(z=float("inf"))
