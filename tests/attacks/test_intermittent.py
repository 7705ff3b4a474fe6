import pytest
import torch
from cases import AttackCase, DataAttackCase, Exempt
from vectors import rows

from lightning_byzantine.aggregators import Krum
from lightning_byzantine.attacks import (
    Alternating,
    GaussianNoise,
    Intermittent,
    LabelFlip,
    Mimic,
    OptimalALittleIsEnough,
    SignFlip,
)

CASES = [
    AttackCase(Intermittent(SignFlip(), probability=1.0), lambda honest, own: [-row for row in own]),
    AttackCase(
        Intermittent(GaussianNoise(), probability=0.5),
        None,
        [
            Exempt(["oracle"], because="it is noise"),
            Exempt(["change"], because="it spares some steps"),
            Exempt(["cuts", "shards"], because="each block and each shard has noise of its own"),
            Exempt(["scaling"], because="its length is in the units of the rows"),
        ],
    ),
    AttackCase(
        Intermittent(Alternating(), start=1),
        lambda honest, own: own,
        [
            Exempt(["change"], because="it spares the first step"),
            Exempt(["permutation"], because="which side is first depends on the order"),
        ],
        name="Intermittent, later",
    ),
    DataAttackCase(
        Intermittent(LabelFlip(num_classes=10), probability=1.0),
        batch=(torch.zeros(3), torch.tensor([0, 1, 9])),
        poisoned=(torch.zeros(3), torch.tensor([9, 8, 0])),
    ),
]


def test_intermittent_attacks_some_steps_and_leaves_others_alone() -> None:
    attack = Intermittent(SignFlip(), probability=0.3, seed=5)
    forged = [attack(rows(), [2]) for _ in range(300)]
    attacked = [torch.equal(vectors[2], -rows()[2]) for vectors in forged]
    assert sum(attacked) == pytest.approx(90, abs=30)
    assert all(torch.equal(vectors, rows()) for vectors, hit in zip(forged, attacked, strict=True) if not hit)
    twin = Intermittent(SignFlip(), probability=0.3, seed=5)
    assert [torch.equal(twin(rows(), [2])[2], -rows()[2]) for _ in range(300)] == attacked
    assert torch.equal(Intermittent(SignFlip(), probability=0.0)(rows(), [2]), rows())


def test_intermittent_workers_may_be_honest_until_they_are_trusted() -> None:
    attack = Intermittent(SignFlip(), start=150)
    forged = [attack(rows() + step, [2, 3])[[2, 3]] for step in range(160)]
    for step, sent in enumerate(forged):
        assert torch.equal(sent, (-1 if step >= 150 else 1) * (rows() + step)[[2, 3]])
    resumed = Intermittent(SignFlip(), start=161)
    resumed.load_state_dict(attack.state_dict())
    assert [torch.equal(resumed(rows(), [2])[2], -rows()[2]) for _ in range(3)] == [False, True, True]


def test_the_drawn_steps_are_the_same_after_any_start() -> None:
    attacks = [Intermittent(SignFlip(), probability=0.5, start=start) for start in (0, 20)]
    drawn = [[torch.equal(attack(rows(), [2])[2], -rows()[2]) for _ in range(50)] for attack in attacks]
    assert drawn[1] == [False] * 20 + drawn[0][20:]


def test_intermittent_poisons_some_batches() -> None:
    attack = Intermittent(LabelFlip(num_classes=10), probability=0.5)
    assert (attack.on_data, attack.on_vectors) == (True, False)
    labels = [attack.poison((0, torch.tensor([2])))[1].item() for _ in range(100)]
    assert set(labels) == {2, 7}
    assert labels.count(7) == pytest.approx(50, abs=20)
    later = Intermittent(LabelFlip(num_classes=10), start=3)
    assert [later.poison((0, torch.tensor([2])))[1].item() for _ in range(5)] == [2, 2, 2, 7, 7]
    with pytest.raises(TypeError, match="Intermittent attacks batches, not vectors: call its `poison`"):
        attack(rows(), [0])


def test_intermittent_is_checked_as_what_it_wraps() -> None:
    with pytest.raises(ValueError, match="worker must be an honest one"):
        Intermittent(Mimic(worker=0), probability=0.5)(rows(), [0])
    with pytest.raises(ValueError, match="aggregator must be given"):
        Intermittent(OptimalALittleIsEnough(), probability=0.0)(rows(), [0])
    attack = Intermittent(OptimalALittleIsEnough(), probability=1.0)
    attack.bind(Krum(), num_byzantine=1)
    assert torch.equal(attack(rows(), [0]), OptimalALittleIsEnough(Krum())(rows(), [0]))
    with pytest.raises(TypeError, match=r"attack must be an Attack, such as SignFlip\(\), got 'SignFlip'"):
        Intermittent("SignFlip", probability=0.5)
    with pytest.raises(ValueError, match=r"probability must be in \[0, 1\], got -0.1"):
        Intermittent(SignFlip(), probability=-0.1)
    with pytest.raises(ValueError, match="start must be at least 0, got -1"):
        Intermittent(SignFlip(), start=-1)
