import copy
import warnings
from collections import namedtuple
from pathlib import Path
from typing import Any

import attack_oracles
import numpy as np
import oracles
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from lightning_byzantine.aggregators import (
    CTMA,
    NNM,
    Aggregator,
    Bucketing,
    CoordinateWiseMedian,
    CoordinateWiseTrimmedMean,
    Krum,
    Mean,
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


def rows(m: int = 7, d: int = 40) -> Tensor:
    return torch.randn(m, d, generator=torch.Generator().manual_seed(2))


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


def honest_rows(vectors: Tensor, byzantine: list[int]) -> list[np.ndarray]:
    return [row for index, row in enumerate(vectors.double().numpy()) if index not in byzantine]


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


PERTURBATIONS = ["std", "unit", "sign"]


@pytest.mark.parametrize("offset", [0.0, 1e4])
@pytest.mark.parametrize("scale", [1e-6, 1.0, 1e6])
@pytest.mark.parametrize("m", [2, 3, 7, 12])
@pytest.mark.parametrize("perturbation", PERTURBATIONS)
def test_min_max_against_a_bisection(perturbation: str, m: int, scale: float, offset: float) -> None:
    vectors = scale * (rows(m, 20).double() + offset)
    forged = MinMax(perturbation)(vectors, [0])[0]
    expected = torch.from_numpy(attack_oracles.min_max(honest_rows(vectors, [0]), perturbation))
    torch.testing.assert_close(forged, expected, rtol=1e-9, atol=1e-6 * scale)


@given(
    data=st.lists(st.lists(st.integers(-3, 3), min_size=2, max_size=2), min_size=2, max_size=6),
    perturbation=st.sampled_from(PERTURBATIONS),
)
def test_min_max_goes_to_the_edge_and_no_further(data: list[list[int]], perturbation: str) -> None:
    vectors = torch.tensor(data, dtype=torch.float64)
    honest = vectors[1:]
    forged = MinMax(perturbation)(vectors, [0])[0]
    mean = honest.mean(0)
    widest = (honest[:, None] - honest).norm(dim=2).max()
    reach = (honest - forged).norm(dim=1).max()
    assert reach <= widest + 1e-9
    if not torch.equal(forged, mean):
        assert (honest - (forged + 1e-3 * (forged - mean))).norm(dim=1).max() > widest


@pytest.mark.parametrize("perturbation", PERTURBATIONS)
def test_min_max_sends_the_mean_where_there_is_no_way_to_go(perturbation: str) -> None:
    assert torch.equal(MinMax(perturbation)(torch.ones(4, 3), [0]), torch.ones(4, 3))
    assert torch.equal(MinMax(perturbation)(torch.zeros(4, 3), [0]), torch.zeros(4, 3))


RULES: dict[str, tuple[Aggregator, oracles.Oracle]] = {
    "mean": (Mean(), oracles.mean),
    "median": (CoordinateWiseMedian(), oracles.coordinate_wise_median),
    "trimmed mean": (CoordinateWiseTrimmedMean(), oracles.coordinate_wise_trimmed_mean),
    "krum": (Krum(), oracles.krum),
    "ctma(nnm(median))": (
        CTMA(NNM(CoordinateWiseMedian())),
        oracles.ctma(oracles.nnm(oracles.coordinate_wise_median)),
    ),
}


@pytest.mark.parametrize("evaluations", [2, 20])
@pytest.mark.parametrize("name", RULES)
def test_optimal_attacks_against_a_loop(name: str, evaluations: int) -> None:
    rule, oracle_of_rule = RULES[name]
    vectors = 0.5 + rows(9, 6).double()
    honest, f = honest_rows(vectors, [5, 6, 7, 8]), 4
    for attack, forge in (
        (OptimalALittleIsEnough(rule, evaluations=evaluations), attack_oracles.a_little_is_enough),
        (OptimalInnerProductManipulation(rule, evaluations=evaluations), attack_oracles.inner_product_manipulation),
    ):
        expected = attack_oracles.optimal(honest, f, oracle_of_rule, forge, 1.0, evaluations)
        torch.testing.assert_close(attack(vectors, [5, 6, 7, 8])[5], torch.from_numpy(expected))


@pytest.mark.parametrize("rule", [rule for rule, _ in RULES.values()], ids=RULES)
def test_optimal_attacks_do_at_least_the_harm_of_what_they_tried(rule: Aggregator) -> None:
    vectors, byzantine = 0.5 + rows(9, 30), [0, 3, 4, 8]
    mean = vectors[[1, 2, 5, 6, 7]].mean(0)

    def harm(attack: Attack) -> float:
        return float((rule(attack(vectors, byzantine), num_byzantine=4) - mean).norm())

    most = harm(OptimalALittleIsEnough(rule))
    assert all(most >= harm(ALittleIsEnough(z=z)) - 1e-6 for z in (1.0, 1e-12))
    most = harm(OptimalInnerProductManipulation(rule))
    assert all(most >= harm(InnerProductManipulation(epsilon)) - 1e-6 for epsilon in (0.0, 1.0))


class Counting(Aggregator):
    """Moves by one at every call, and counts the calls, of copies too."""

    calls = 0

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("position", torch.zeros(()))

    def locate(self, matrix: WorkerMatrix, num_byzantine: int) -> Any:
        Counting.calls += 1
        self.position += 1
        return matrix.mean()


def test_a_line_search_leaves_the_rule_as_it_was_and_runs_it_as_often_as_said() -> None:
    rule = Counting()
    attack = OptimalInnerProductManipulation(rule, evaluations=7)
    before = Counting.calls
    attack(rows(), [0])
    assert Counting.calls - before == 7
    assert rule.position == 0
    assert attack.state_dict() == {}

    bucketing, twin = (Bucketing(CoordinateWiseMedian(), seed=3) for _ in range(2))
    vectors = OptimalALittleIsEnough(bucketing)(rows(), [0])
    assert torch.equal(bucketing(vectors, num_byzantine=1), twin(vectors, num_byzantine=1))


def test_a_line_search_needs_a_rule_that_can_serve() -> None:
    with pytest.raises(ValueError, match=r"aggregator must be given .* OptimalALittleIsEnough\(aggregator=\.\.\.\)"):
        OptimalALittleIsEnough()(rows(), [0])
    with pytest.raises(ValueError, match="num_byzantine must satisfy 0 <= f < m / 2, got f=4 with m=7"):
        OptimalALittleIsEnough(Krum())(rows(), [0, 1, 2, 3])
    attack = OptimalInnerProductManipulation()
    attack.aim(Krum(), num_byzantine=2)
    assert attack(rows(), [0]).isfinite().all()
    with pytest.raises(TypeError, match=r"aggregator must be an Aggregator, such as Krum\(\), got 'Krum'"):
        OptimalALittleIsEnough("Krum")
    with pytest.raises(ValueError, match="evaluations must be at least 2, got 1"):
        OptimalALittleIsEnough(Krum(), evaluations=1)
    with pytest.raises(ValueError, match="step must not be 0"):
        OptimalALittleIsEnough(Krum(), step=0.0)
    with pytest.raises(ValueError, match="step must be finite and above 0, got -1"):
        OptimalInnerProductManipulation(Krum(), step=-1.0)
    with pytest.raises(ValueError, match="num_byzantine must be at least 0, got -1"):
        OptimalALittleIsEnough(Krum(), num_byzantine=-1)


def test_a_line_search_does_not_stop_the_training() -> None:
    # Three colluders, of which the rule is told to expect one: overflowing together would break it down.
    attack = OptimalInnerProductManipulation(Mean(), num_byzantine=1, evaluations=20, step=1e30)
    vectors = rows()
    assert attack(vectors, [0, 1, 2]).isfinite().all()
    assert Mean()(attack(vectors, [0, 1, 2]), num_byzantine=1).isfinite().all()


DTYPES = {"float16": torch.float16, "float32": torch.float32, "float64": torch.float64}


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


def test_a_resumed_stale_gradient_waits_for_the_order_it_knows() -> None:
    attack, resumed = StaleGradient(delay=3), StaleGradient(delay=3)
    for step in range(8):
        attack.tamper(laid_out(float(step), REBUILT, [2, 3]), [1])
    resumed.load_state_dict(attack.state_dict())
    sent = [resumed.tamper(laid_out(8.0, FIRST, [5]), [1]).blocks[0][1, 0].item()]
    for step in range(9, 14):
        sent.append(resumed.tamper(laid_out(float(step), REBUILT, [2, 3]), [1]).blocks[0][1, 0].item())
    assert sent == [8.0, 6.0, 7.0, 9.0, 9.0, 10.0]


def test_a_resumed_stale_gradient_knows_its_own_shard_only() -> None:
    attack, resumed = StaleGradient(delay=3), StaleGradient(delay=3)
    attack.tamper(laid_out(0.0, FIRST, [5]), [1])
    resumed.load_state_dict(attack.state_dict())
    assert resumed.tamper(laid_out(1.0, FIRST, [5], shard=1), [1]).blocks[0][1, 0] == 1.0


def test_intermittent_attacks_some_steps_and_leaves_others_alone() -> None:
    attack = Intermittent(SignFlip(), probability=0.3, seed=5)
    forged = [attack(rows(), [2]) for _ in range(300)]
    attacked = [torch.equal(vectors[2], -rows()[2]) for vectors in forged]
    assert sum(attacked) == pytest.approx(90, abs=30)
    assert all(torch.equal(vectors, rows()) for vectors, hit in zip(forged, attacked, strict=True) if not hit)
    twin = Intermittent(SignFlip(), probability=0.3, seed=5)
    assert [torch.equal(twin(rows(), [2])[2], -rows()[2]) for _ in range(300)] == attacked
    assert torch.equal(Intermittent(SignFlip(), probability=0.0)(rows(), [2]), rows())


def test_intermittent_poisons_some_batches() -> None:
    attack = Intermittent(LabelFlip(num_classes=10), probability=0.5)
    assert (attack.on_data, attack.on_vectors) == (True, False)
    labels = [attack.poison((0, torch.tensor([2])))[1].item() for _ in range(100)]
    assert set(labels) == {2, 7}
    assert labels.count(7) == pytest.approx(50, abs=20)
    with pytest.raises(TypeError, match="Intermittent attacks batches, not vectors: call its `poison`"):
        attack(rows(), [0])


def test_intermittent_is_checked_as_what_it_wraps() -> None:
    with pytest.raises(ValueError, match="worker must be an honest one"):
        Intermittent(Mimic(worker=0), probability=0.5)(rows(), [0])
    with pytest.raises(ValueError, match="aggregator must be given"):
        Intermittent(OptimalALittleIsEnough(), probability=0.0)(rows(), [0])
    attack = Intermittent(OptimalALittleIsEnough(), probability=1.0)
    attack.aim(Krum(), num_byzantine=1)
    assert torch.equal(attack(rows(), [0]), OptimalALittleIsEnough(Krum())(rows(), [0]))
    with pytest.raises(TypeError, match=r"attack must be an Attack, such as SignFlip\(\), got 'SignFlip'"):
        Intermittent("SignFlip", probability=0.5)
    with pytest.raises(ValueError, match=r"probability must be in \[0, 1\], got -0.1"):
        Intermittent(SignFlip(), probability=-0.1)


@pytest.mark.parametrize(
    "attack",
    [
        GaussianNoise(),
        BitFlip(probability=0.5),
        StaleGradient(delay=3),
        Intermittent(GaussianNoise(), probability=0.5),
        Intermittent(StaleGradient(delay=2), probability=0.5),
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
