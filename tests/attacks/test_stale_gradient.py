from typing import Any

import pytest
import torch
from cases import AttackCase, Exempt
from vectors import rows

from lightning_byzantine.attacks import StaleGradient
from lightning_byzantine.matrix import WorkerMatrix

CASES = [
    AttackCase(
        StaleGradient(delay=3),
        lambda honest, own: own,
        [
            Exempt(["change"], because="there is nothing old to send in the first step"),
            Exempt(["resuming"], because="old estimates are too large for a checkpoint"),
        ],
    )
]


@pytest.mark.parametrize("delay", [1, 2, 5])
def test_stale_gradient_against_a_list(delay: int) -> None:
    attack = StaleGradient(delay)
    steps = [rows() + step for step in range(12)]
    for step, vectors in enumerate(steps):
        forged = attack(vectors, [4, 1])
        assert torch.equal(forged[[1, 4]], steps[max(0, step - delay)][[1, 4]])
        assert torch.equal(forged[[0, 2, 3, 5, 6]], vectors[[0, 2, 3, 5, 6]])


def test_stale_gradient_does_not_see_what_happens_to_its_input_later() -> None:
    attack, buffer = StaleGradient(delay=1), torch.ones(2, 3)
    attack(buffer, [0])
    buffer.fill_(5.0)  # as exchanges do, which keep their buffers
    assert torch.equal(attack(buffer, [0])[0], torch.ones(3))


def laid_out(step: float, layout: Any, widths: list[int], shard: int = 0) -> WorkerMatrix:
    matrix = WorkerMatrix([torch.full((3, width), step) for width in widths], shard=shard)
    matrix.layout = layout
    return matrix


FIRST, REBUILT = (("a", "b"),), (("b",), ("a",))


def test_stale_gradient_passes_over_columns_of_another_order() -> None:
    attack = StaleGradient(delay=2)

    def sent(step: int, *place: Any) -> float:
        blocks = attack.tamper(laid_out(float(step), *place), [1]).blocks
        assert all(torch.equal(block[[0, 2]], torch.full_like(block[[0, 2]], float(step))) for block in blocks)
        return blocks[0][1, 0].item()

    assert sent(0, FIRST, [5]) == 0.0
    # The same width, but other parameters in it, and then blocks cut elsewhere.
    assert [sent(step, (("b", "a"),), [5]) for step in (1, 2, 3, 4)] == [1.0, 1.0, 1.0, 2.0]
    assert [sent(step, REBUILT, [2, 3]) for step in (5, 6, 7, 8)] == [5.0, 5.0, 5.0, 6.0]


def test_a_resumed_stale_gradient_starts_with_no_old_estimates() -> None:
    attack, resumed = StaleGradient(delay=1), StaleGradient(delay=1)
    attack(rows(), [1])
    resumed.load_state_dict(attack.state_dict())
    assert torch.equal(resumed(rows() + 1, [1]), rows() + 1)
    assert torch.equal(resumed(rows() + 2, [1])[1], rows()[1] + 1)
