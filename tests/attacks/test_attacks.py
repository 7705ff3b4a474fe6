import copy
import warnings
from collections import namedtuple
from pathlib import Path
from typing import Any

import pytest
import torch
from vectors import rows

from lightning_byzantine.aggregators import (
    CTMA,
    NNM,
    CoordinateWiseMedian,
)
from lightning_byzantine.attacks import (
    ALittleIsEnough,
    Attack,
    BitFlip,
    GaussianNoise,
    InnerProductManipulation,
    Intermittent,
    LabelFlip,
    Mimic,
    MinMax,
    NonFinite,
    OptimalALittleIsEnough,
    OptimalInnerProductManipulation,
    Scale,
    SignFlip,
    StaleGradient,
    VectorAttack,
    Zero,
)
from lightning_byzantine.matrix import WorkerMatrix

# What they send does not depend on chance, nor on the step.
FIXED: list[Attack] = [
    SignFlip(),
    InnerProductManipulation(),
    ALittleIsEnough(z=1.0),
    NonFinite(),
    Zero(),
    Scale(factor=-3.0),
    Mimic(),
    Mimic(worker=5),
    MinMax(),
    MinMax("unit"),
    MinMax("sign"),
    BitFlip(bit=15),
    Intermittent(SignFlip(), probability=1.0),
    OptimalALittleIsEnough(CTMA(NNM(CoordinateWiseMedian())), evaluations=4),
    OptimalInnerProductManipulation(CoordinateWiseMedian(), num_byzantine=3, evaluations=5),
]
ATTACKS: list[Attack] = [*FIXED, GaussianNoise(std=2.0), BitFlip(), BitFlip(bit=2, fraction=0.5)]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("attack", ATTACKS, ids=repr)
def test_only_byzantine_rows_change_and_the_input_does_not(attack: Attack, dtype: torch.dtype) -> None:
    vectors = rows().to(dtype)
    before = vectors.clone()
    forged = attack(vectors, byzantine=[0, 4])
    assert torch.equal(vectors, before)
    assert forged.dtype == dtype
    honest = [1, 2, 3, 5, 6]
    assert torch.equal(forged[honest], vectors[honest])
    assert not torch.equal(forged[[0, 4]], vectors[[0, 4]])


@pytest.mark.parametrize("attack", FIXED, ids=repr)
def test_blocks_give_what_the_whole_gives(attack: Attack) -> None:
    whole = attack(rows(), byzantine=[2, 3])
    tampered = attack.tamper(WorkerMatrix(rows().split([1, 30, 9], dim=1)), [2, 3])
    torch.testing.assert_close(torch.cat(tampered.blocks, dim=1), whole, equal_nan=True)


@pytest.mark.parametrize("attack", ATTACKS, ids=repr)
def test_all_at_once_or_one_by_one_and_in_any_order(attack: Attack) -> None:
    first, second = copy.deepcopy(attack), copy.deepcopy(attack)
    torch.testing.assert_close(first(rows(), [0, 4]), second(rows(), [4, 0]), rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("attack", [attack for attack in FIXED if not isinstance(attack, Mimic)], ids=repr)
def test_honest_workers_have_no_order(attack: Attack) -> None:
    vectors, order = rows(), [0, 6, 3, 2, 4, 1, 5]
    torch.testing.assert_close(attack(vectors[order], [0, 4]), attack(vectors, [0, 4])[order], equal_nan=True)


@pytest.mark.parametrize("factor", [2.0**-20, 2.0**20])
@pytest.mark.parametrize("attack", [attack for attack in FIXED if not isinstance(attack, BitFlip)], ids=repr)
def test_attacks_have_no_scale(attack: Attack, factor: float) -> None:
    expected = factor * attack(rows(), [0, 4])
    torch.testing.assert_close(attack(factor * rows(), [0, 4]), expected, rtol=1e-5, atol=0, equal_nan=True)


@pytest.mark.parametrize("attack", FIXED, ids=repr)
def test_a_single_honest_row_is_enough(attack: Attack) -> None:
    if isinstance(attack, Mimic):
        attack = Mimic(worker=1)
    if isinstance(attack, OptimalInnerProductManipulation):
        attack = OptimalInnerProductManipulation(CoordinateWiseMedian(), num_byzantine=0)
    if isinstance(attack, OptimalALittleIsEnough):
        attack = OptimalALittleIsEnough(CoordinateWiseMedian(), num_byzantine=0)
    vectors = rows(2)
    forged = attack(vectors, [0])
    assert torch.equal(forged[1], vectors[1])
    if not isinstance(attack, NonFinite | BitFlip):
        assert forged.isfinite().all()


def test_sign_flip_sends_the_opposite_of_its_own() -> None:
    assert torch.equal(SignFlip()(rows(), [1])[1], -rows()[1])


def test_inner_product_manipulation_against_a_loop() -> None:
    vectors = rows().double()
    mean = sum(vectors[i] for i in (0, 1, 2, 5, 6)) / 5
    forged = InnerProductManipulation(epsilon=0.7)(vectors, [3, 4])
    torch.testing.assert_close(forged[3], -0.7 * mean)
    assert torch.equal(forged[3], forged[4])


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


def test_zero_and_scale_by_their_names() -> None:
    assert torch.equal(Zero()(rows(), [3])[3], torch.zeros(40))
    assert torch.equal(Scale(factor=2.5)(rows(), [3])[3], 2.5 * rows()[3])


def test_mimic_copies_the_first_honest_worker_or_the_one_that_is_named() -> None:
    assert torch.equal(Mimic()(rows(), [0, 2])[[0, 2]], rows()[[1, 1]])
    assert torch.equal(Mimic(worker=6)(rows(), [0, 2])[[0, 2]], rows()[[6, 6]])
    with pytest.raises(ValueError, match=r"worker must be an honest one, got worker=2 with \[0, 2\] Byzantine"):
        Mimic(worker=2)(rows(), [2, 0])
    with pytest.raises(ValueError, match=r"worker must be in \[0, 7\) for 7 workers, got 7"):
        Mimic(worker=7)(rows(), [0])
    with pytest.raises(ValueError, match="worker must be at least 0, got -1"):
        Mimic(worker=-1)


@pytest.mark.parametrize(
    "attack",
    [
        GaussianNoise(),
        BitFlip(probability=0.5),
        Intermittent(GaussianNoise(), probability=0.5),
    ],
    ids=repr,
)
def test_a_resumed_attack_goes_on_as_if_nothing_had_happened(attack: Attack, tmp_path: Path) -> None:
    attack, resumed = copy.deepcopy(attack), copy.deepcopy(attack)
    for step in range(7):
        attack(rows() + step, [0, 2])
    torch.save(attack.state_dict(), tmp_path / "state")
    resumed.load_state_dict(torch.load(tmp_path / "state", weights_only=True))
    for step in range(7, 14):
        expected, actual = (each(rows() + step, [0, 2]) for each in (attack, resumed))
        torch.testing.assert_close(actual, expected, rtol=0, atol=0, equal_nan=True)


def test_attacks_on_data_are_not_for_vectors_and_those_on_vectors_need_a_formula() -> None:
    class Nothing(VectorAttack):
        pass

    with pytest.raises(TypeError, match="LabelFlip attacks batches, not vectors: call its `poison`"):
        LabelFlip(num_classes=10)(rows(), [0])
    with pytest.raises(NotImplementedError, match="Nothing must override forge, or tamper"):
        Nothing()(rows(), [0])


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


@pytest.mark.parametrize(
    ("byzantine", "error", "message"),
    [
        ([7], ValueError, r"workers must be indices in \[0, 7\) for 7 workers, got 7"),
        ([-1], ValueError, r"\[0, 7\) for 7 workers, got -1"),
        ([1, 1], ValueError, r"workers must name at least one worker, and each once, got \[1, 1\]"),
        (list(range(7)), ValueError, "workers must leave at least one honest worker, got all 7"),
        ([], ValueError, r"workers must name at least one worker, and each once, got \[\]"),
        (["0"], TypeError, "each of workers must be an int, got '0'"),
        (1, TypeError, "workers must be a list of worker indices, got 1"),
    ],
)
def test_bad_workers_are_named(byzantine: list[Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        SignFlip()(rows(), byzantine)


def test_bad_arguments_are_named() -> None:
    with pytest.raises(ValueError, match="2D tensor"):
        SignFlip()(torch.zeros(3), [0])
    with pytest.raises(ValueError, match="epsilon must be finite and at least 0, got -1"):
        InnerProductManipulation(epsilon=-1)
    with pytest.raises(ValueError, match="std must be finite and at least 0, got -1"):
        GaussianNoise(std=-1)
    with pytest.raises(ValueError, match="std must be finite and at least 0, got inf"):
        GaussianNoise(std=float("inf"))
    with pytest.raises(TypeError, match="z must be a number, got '1'"):
        ALittleIsEnough(z="1")
    with pytest.raises(TypeError, match="target must be an index or a key of a batch, got None"):
        LabelFlip(num_classes=10, target=None)
    with pytest.raises(ValueError, match="factor must be finite, got nan"):
        Scale(factor=float("nan"))
    with pytest.raises(ValueError, match="delay must be at least 1, got 0"):
        StaleGradient(delay=0)
    with pytest.raises(ValueError, match="perturbation must be one of std, unit, sign, got 'mean'"):
        MinMax("mean")
    with pytest.raises(ValueError, match="num_classes must be at least 2, got 1"):
        LabelFlip(num_classes=1)


Named = namedtuple("Named", ["images", "labels"])


@pytest.mark.parametrize(
    ("batch", "target"),
    [
        ((torch.zeros(3), torch.tensor([0, 1, 9])), 1),
        ([torch.zeros(3), torch.tensor([0, 1, 9])], -1),
        ({"x": torch.zeros(3), "y": torch.tensor([0, 1, 9])}, "y"),
        (Named(torch.zeros(3), torch.tensor([0, 1, 9])), 1),
    ],
)
def test_label_flip_returns_a_poisoned_copy(batch: Any, target: Any) -> None:
    poisoned = LabelFlip(num_classes=10, target=target).poison(batch)
    assert type(poisoned) is type(batch)
    assert poisoned[target].tolist() == [9, 8, 0]
    assert batch[target].tolist() == [0, 1, 9]
    first = next(iter(batch)) if isinstance(batch, dict) else 0
    assert poisoned[first] is batch[first]


@pytest.mark.parametrize(
    ("batch", "target", "error", "message"),
    [
        (torch.zeros(3), 1, TypeError, "tuple, list or dict as a batch, got Tensor"),
        ((torch.zeros(3),), 1, ValueError, "target must be where the batch has its labels, got target=1 with 1 items"),
        ({"x": 1}, "y", ValueError, r"got target='y' with \['x'\]"),
        ((1, torch.zeros(3)), 1, TypeError, "must be an integer tensor, got torch.float32 at target=1"),
        ((1, [0, 1]), 1, TypeError, "must be an integer tensor, got list"),
        ((1, torch.tensor([0, 12])), 1, ValueError, r"\[0, num_classes\) with num_classes=10, got 0 to 12"),
        ((1, torch.tensor([0, 1])), "y", ValueError, "got target='y' with 2 items"),
    ],
)
def test_label_flip_says_what_is_wrong_with_a_batch(
    batch: Any, target: Any, error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        LabelFlip(num_classes=10, target=target).poison(batch)
