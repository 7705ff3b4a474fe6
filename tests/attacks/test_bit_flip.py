import attack_oracles
import numpy as np
import pytest
import torch
from cases import AttackCase, AttackOracle, Exempt
from torch import Tensor
from vectors import rows

from lightning_byzantine.attacks import BitFlip

DTYPES = {"float16": torch.float16, "float32": torch.float32, "float64": torch.float64}


def flipped(bit: int) -> AttackOracle:
    return lambda honest, own: [
        np.array([attack_oracles.flip_bit(each, bit, "float64") for each in row]) for row in own
    ]


BY_CHANCE = Exempt(["oracle"], because="it is chance which bits are flipped")
BY_BLOCKS = Exempt(["cuts", "shards"], because="it is drawn for each block and each shard")
OWN_UNITS = Exempt(["scaling"], because="what a bit means depends on the number")
ANYTHING = Exempt(["finite"], because="the bits of the exponent can make any number")
CASES = [
    AttackCase(BitFlip(bit=15), flipped(15), [OWN_UNITS, ANYTHING]),
    AttackCase(BitFlip(), None, [BY_CHANCE, BY_BLOCKS, OWN_UNITS, ANYTHING], name="BitFlip, random"),
    AttackCase(
        BitFlip(bit=2, fraction=0.5),
        None,
        [BY_CHANCE, BY_BLOCKS, OWN_UNITS, ANYTHING],
        name="BitFlip, half of the values",
    ),
    AttackCase(
        BitFlip(probability=0.5),
        None,
        [BY_CHANCE, BY_BLOCKS, OWN_UNITS, ANYTHING, Exempt(["change"], because="it spares some steps")],
        name="BitFlip, half of the steps",
    ),
]


@pytest.mark.parametrize("dtype", DTYPES)
def test_bit_flip_against_bytes(dtype: str) -> None:
    vectors = rows(2, 6).to(DTYPES[dtype])
    vectors[0, :4] = torch.tensor([0.0, -0.0, torch.inf, 1.0])
    for bit in range(8 * vectors.itemsize):
        expected = [attack_oracles.flip_bit(value, bit, dtype) for value in vectors[0].tolist()]
        assert BitFlip(bit=bit)(vectors, [0])[0].tolist() == pytest.approx(expected, rel=0, abs=0, nan_ok=True)


def test_bit_flip_in_bfloat16_which_is_the_upper_half_of_float32() -> None:
    vectors = rows(2, 6).bfloat16()
    for bit in range(16):
        wide = BitFlip(bit=bit + 16)(vectors.float(), [0])
        assert torch.equal(BitFlip(bit=bit)(vectors, [0]).float().nan_to_num(), wide.nan_to_num())


def bits_changed(vectors: Tensor, forged: Tensor) -> list[int]:
    changed = vectors.view(torch.int32) ^ forged.view(torch.int32)
    return [bin(value & 0xFFFFFFFF).count("1") for value in changed.flatten().tolist()]


def test_a_random_bit_is_one_bit_of_each_value_and_another_in_each() -> None:
    vectors = rows(2, 2_000)
    forged = BitFlip()(vectors, [0])
    assert bits_changed(vectors[0], forged[0]) == [1] * 2_000
    changed = vectors[0].view(torch.int32) ^ forged[0].view(torch.int32)
    assert len(set(changed.tolist())) == 32


def test_a_fraction_of_the_values_is_hit_in_a_part_of_the_steps() -> None:
    vectors = rows(2, 1_000)
    attack = BitFlip(bit=31, probability=0.3, fraction=0.1)
    hits = [sum(bits_changed(vectors[0], attack(vectors, [0])[0])) for _ in range(300)]
    steps = [hit for hit in hits if hit]
    assert len(steps) == pytest.approx(90, abs=30)
    assert sum(steps) / len(steps) == pytest.approx(100, abs=10)
    assert len(set(steps)) > 10
    assert torch.equal(BitFlip(probability=0.0)(vectors, [0]), vectors)


def test_bit_flip_names_what_is_wrong() -> None:
    with pytest.raises(ValueError, match=r"bit must be in \[0, 16\) for torch.bfloat16, got 31"):
        BitFlip(bit=31)(rows().bfloat16(), [0])
    with pytest.raises(ValueError, match="bit must be at least 0, got -1"):
        BitFlip(bit=-1)
    with pytest.raises(ValueError, match=r"probability must be in \[0, 1\], got 1.5"):
        BitFlip(probability=1.5)
    with pytest.raises(ValueError, match=r"fraction must be in \[0, 1\], got nan"):
        BitFlip(fraction=float("nan"))
