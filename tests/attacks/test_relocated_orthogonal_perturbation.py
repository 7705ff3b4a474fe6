from typing import Any

import attack_oracles
import pytest
import torch
from cases import AttackCase
from shards import in_shards
from vectors import as_list, rows

from lightning_byzantine.aggregators import CenteredClipping
from lightning_byzantine.attacks import RelocatedOrthogonalPerturbation
from lightning_byzantine.matrix import Segments, WorkerMatrix

ARGUMENTS: list[dict[str, Any]] = [{}, {"z": 2.5, "angle": 120.0, "relocation": 0.3, "reference": 0.6}]
CASES = [
    AttackCase(
        RelocatedOrthogonalPerturbation(**arguments),
        lambda honest, own, arguments=arguments: (
            [attack_oracles.relocated_orthogonal_perturbation(honest, **arguments)] * len(own)
        ),
        name=f"RelocatedOrthogonalPerturbation {arguments or ''}".strip(),
    )
    for arguments in ARGUMENTS
]


@pytest.mark.parametrize("arguments", ARGUMENTS, ids=str)
def test_is_beside_the_previous_aggregate(arguments: dict[str, Any]) -> None:
    vectors, last = 1 + rows(7).double(), rows(8)[7].double()
    attack = RelocatedOrthogonalPerturbation(**arguments)
    expected = torch.from_numpy(
        attack_oracles.relocated_orthogonal_perturbation(as_list(vectors[2:]), **arguments, last=last.numpy())
    )
    matrix = WorkerMatrix([vectors]).with_previous([last])
    torch.testing.assert_close(attack.tamper(matrix, [0, 1]).blocks[0][0], expected)

    def in_a_shard(shard: WorkerMatrix) -> torch.Tensor:
        return attack.tamper(shard.with_previous([last.split(10)[shard.shard]]), [0, 1]).blocks[0]

    sent = torch.cat(in_shards(in_a_shard, list(vectors.split(10, dim=1))), dim=1)
    torch.testing.assert_close(sent[0], expected)


def test_centered_clipping_does_not_shorten_it() -> None:
    vectors, last = rows(7, 500), rows(8, 500)[7]
    forged = RelocatedOrthogonalPerturbation().tamper(WorkerMatrix([vectors]).with_previous([last]), [6])
    radius = attack_oracles.honest_radius(as_list(vectors[:6]))
    move = forged.blocks[0][6] - last
    assert move.norm() == pytest.approx(radius, rel=1e-4)
    alone = forged.select(torch.tensor([6])).with_previous([last])
    assert torch.allclose(CenteredClipping(tau=1.01 * radius).aggregate(alone, 0)[0], forged.blocks[0][6], atol=1e-5)
    assert move.sum() < 0


def test_columns_of_no_parameter_stay_zero() -> None:
    vectors = rows(7, 50)
    vectors[:, 20:30] = 0
    segments = Segments.of_blocks({"a": 20, "b": 10, "c": 20}, [(("a", None, "c"), [20, 10, 20])])
    forged = RelocatedOrthogonalPerturbation().tamper(WorkerMatrix([vectors], segments=segments), [0]).blocks[0]
    assert torch.equal(forged[0, 20:30], torch.zeros(10))
    without = RelocatedOrthogonalPerturbation()(torch.cat([vectors[:, :20], vectors[:, 30:]], dim=1), [0])
    torch.testing.assert_close(torch.cat([forged[:, :20], forged[:, 30:]], dim=1), without)


def test_sends_the_mean_where_nothing_is_orthogonal() -> None:
    vectors = torch.tensor([[1.0, 1.0, 1.0], [2.0, 2.0, 2.0], [9.0, 9.0, 9.0]])
    torch.testing.assert_close(RelocatedOrthogonalPerturbation()(vectors, [2])[2], torch.full((3,), 1.5))
    around_zero = torch.tensor([[3.0, 0.0], [-3.0, 0.0], [9.0, 9.0]])
    sent = RelocatedOrthogonalPerturbation(angle=90.0)(around_zero, [2])[2]
    torch.testing.assert_close(sent, torch.full((2,), 3 / 2**0.5))


def test_bad_arguments_are_named() -> None:
    with pytest.raises(ValueError, match="z must be finite and at least 0, got -1"):
        RelocatedOrthogonalPerturbation(z=-1)
    with pytest.raises(ValueError, match="angle must be finite, got inf"):
        RelocatedOrthogonalPerturbation(angle=float("inf"))
    with pytest.raises(ValueError, match=r"relocation must be in \[0, 1\], got 2"):
        RelocatedOrthogonalPerturbation(relocation=2)
    with pytest.raises(ValueError, match=r"reference must be in \[0, 1\], got -1"):
        RelocatedOrthogonalPerturbation(reference=-1)
