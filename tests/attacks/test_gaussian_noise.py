import pytest
import torch
from cases import AttackCase, Exempt
from vectors import rows

from lightning_byzantine.attacks import GaussianNoise
from lightning_byzantine.matrix import WorkerMatrix

CASES = [
    AttackCase(
        GaussianNoise(std=2.0),
        None,
        [
            Exempt(["oracle"], because="it is noise"),
            Exempt(["cuts", "shards"], because="each block and each shard has noise of its own"),
            Exempt(["scaling"], because="its length is in the units of the rows"),
        ],
    )
]


def test_noise_is_new_at_every_step_and_resumes() -> None:
    attack, twin = GaussianNoise(std=3.0, seed=1), GaussianNoise(std=3.0, seed=1)
    vectors = rows(3, 20_000)
    first, second = attack(vectors, [0])[0], attack(vectors, [0])[0]
    assert float(first.std()) == pytest.approx(3.0, rel=0.05)
    assert abs(float(first.mean())) < 0.1
    assert not torch.equal(first, second)
    twin(vectors, [0])
    resumed = GaussianNoise(std=3.0, seed=1)
    resumed.load_state_dict(twin.state_dict())
    assert torch.equal(resumed(vectors, [0])[0], second)


def test_every_row_and_every_block_has_its_own_noise() -> None:
    blocks = GaussianNoise().tamper(WorkerMatrix([torch.zeros(4, 50), torch.zeros(4, 50)]), [0, 1]).blocks
    noise = [block[row] for block in blocks for row in (0, 1)]
    assert all(not torch.equal(noise[i], noise[j]) for i in range(4) for j in range(i))
