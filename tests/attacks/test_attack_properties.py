"""What is true of every attack: of each that a test file in this folder declares in a list named CASES."""

import copy
import pkgutil
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from cases import AttackCase, DataAttackCase, declared_in, shown_arguments
from shards import in_shards
from vectors import as_list, rows

from lightning_byzantine import attacks
from lightning_byzantine.attacks import Attack
from lightning_byzantine.matrix import WorkerMatrix

ALL_CASES: list[AttackCase] = declared_in(Path(__file__).parent, AttackCase)
DATA_CASES: list[DataAttackCase] = declared_in(Path(__file__).parent, DataAttackCase)

every_case = pytest.mark.parametrize("case", ALL_CASES, ids=lambda case: case.name)
every_data_case = pytest.mark.parametrize("case", DATA_CASES, ids=lambda case: case.name)


def every_case_with(wanted: str) -> pytest.MarkDecorator:
    """Parametrise by all cases that have a property."""
    cases = [case for case in ALL_CASES if case.has(wanted)]
    return pytest.mark.parametrize("case", cases, ids=lambda case: case.name)


def concrete_attacks() -> set[type[Attack]]:
    """Return all attacks of the package, other than those that others are derived from."""
    names = [f"{attacks.__name__}.{module.name}" for module in pkgutil.iter_modules(attacks.__path__)]
    found = [value for name in names for value in vars(import_module(name)).values() if isinstance(value, type)]
    kinds = {each for each in found if issubclass(each, Attack)}
    return {kind for kind in kinds if not any(other is not kind and issubclass(other, kind) for other in kinds)}


def test_every_attack_is_public() -> None:
    missing = {attack.__name__ for attack in concrete_attacks()} - set(attacks.__all__)
    assert not missing, f"lightning_byzantine/attacks/__init__.py must import and name {sorted(missing)}"


def test_every_attack_is_declared() -> None:
    declared = {type(case.subject) for case in [*ALL_CASES, *DATA_CASES]}
    missing = {attack.__name__ for attack in concrete_attacks() - declared}
    assert not missing, f"a test file in {Path(__file__).parent} must declare {sorted(missing)} in its CASES"


@every_case_with("oracle")
def test_sends_what_the_oracle_sends(case: AttackCase, subtests: pytest.Subtests) -> None:
    for m, byzantine in ((7, [0, 4]), (7, [2, 3]), (9, [8]), (2, [0])):
        if not case.serves(m, byzantine):
            continue
        with subtests.test(m=m, byzantine=byzantine):
            vectors = rows(m).double()
            honest, own = vectors[[i for i in range(m) if i not in byzantine]], vectors[byzantine]
            expected = torch.from_numpy(np.array(case.oracle(as_list(honest), as_list(own))))
            actual = case.fresh()(vectors, byzantine)[byzantine]
            torch.testing.assert_close(actual, expected, rtol=1e-6, atol=1e-8, equal_nan=True)


@every_case
def test_only_byzantine_rows_change_and_the_input_does_not(case: AttackCase, subtests: pytest.Subtests) -> None:
    for dtype in (torch.float16, torch.bfloat16, torch.float32, torch.float64):
        with subtests.test(dtype=dtype):
            vectors = rows().to(dtype)
            before = vectors.clone()
            forged = case.fresh()(vectors, byzantine=[0, 4])
            assert torch.equal(vectors, before)
            assert forged.dtype == dtype
            honest = [1, 2, 3, 5, 6]
            assert torch.equal(forged[honest], vectors[honest])
            if case.has("change"):
                assert not torch.equal(forged[[0, 4]], vectors[[0, 4]])


@every_case_with("cuts")
def test_blocks_give_what_the_whole_gives(case: AttackCase) -> None:
    whole = case.fresh()(rows(), byzantine=[2, 3])
    tampered = case.fresh().tamper(WorkerMatrix(rows().split([1, 30, 9], dim=1)), [2, 3])
    torch.testing.assert_close(torch.cat(tampered.blocks, dim=1), whole, equal_nan=True)


@every_case_with("shards")
def test_shards_give_what_the_whole_gives(case: AttackCase) -> None:
    whole = case.fresh()(rows(), byzantine=[2, 3])
    tampered = in_shards(lambda shard: case.fresh().tamper(shard, [2, 3]).blocks[0], list(rows().split(20, dim=1)))
    torch.testing.assert_close(torch.cat(tampered, dim=1), whole, equal_nan=True)


@every_case
def test_all_at_once_or_one_by_one_and_in_any_order(case: AttackCase) -> None:
    first, second = case.fresh()(rows(), [0, 4]), case.fresh()(rows(), [4, 0])
    torch.testing.assert_close(first, second, rtol=0, atol=0, equal_nan=True)


@every_case_with("permutation")
def test_honest_workers_have_no_order(case: AttackCase) -> None:
    vectors, order = rows(), [0, 6, 3, 2, 4, 1, 5]
    expected = case.fresh()(vectors, [0, 4])[order]
    torch.testing.assert_close(case.fresh()(vectors[order], [0, 4]), expected, equal_nan=True)


@pytest.mark.parametrize("factor", [2.0**-20, 2.0**20])
@every_case_with("scaling")
def test_attacks_have_no_scale(case: AttackCase, factor: float) -> None:
    expected = factor * case.fresh()(rows(), [0, 4])
    torch.testing.assert_close(case.fresh()(factor * rows(), [0, 4]), expected, rtol=1e-5, atol=0, equal_nan=True)


@pytest.mark.parametrize("case", [case for case in ALL_CASES if case.serves(2, [0])], ids=lambda case: case.name)
def test_a_single_honest_row_is_enough(case: AttackCase) -> None:
    vectors = rows(2)
    forged = case.fresh()(vectors, [0])
    assert torch.equal(forged[1], vectors[1])
    if case.has("finite"):
        assert forged.isfinite().all()


def test_every_attack_has_a_case_with_a_single_honest_row() -> None:
    assert {type(case.subject) for case in ALL_CASES} == {
        type(case.subject) for case in ALL_CASES if case.serves(2, [0])
    }


@every_case_with("resuming")
def test_a_resumed_attack_goes_on_as_if_nothing_had_happened(case: AttackCase, tmp_path: Path) -> None:
    attack, resumed = case.fresh(), case.fresh()
    for step in range(7):
        attack(rows() + step, [0, 2])
    torch.save(attack.state_dict(), tmp_path / "state")
    resumed.load_state_dict(torch.load(tmp_path / "state", weights_only=True))
    for step in range(7, 14):
        expected, actual = (each(rows() + step, [0, 2]) for each in (attack, resumed))
        torch.testing.assert_close(actual, expected, rtol=0, atol=0, equal_nan=True)


BAD_WORKERS: list[tuple[Any, type[Exception], str]] = [
    ([7], ValueError, r"workers must be indices in \[0, 7\) for 7 workers, got 7"),
    ([-1], ValueError, r"\[0, 7\) for 7 workers, got -1"),
    ([1, 1], ValueError, r"workers must name at least one worker, and each once, got \[1, 1\]"),
    (list(range(7)), ValueError, "workers must leave at least one honest worker, got all 7"),
    ([], ValueError, r"workers must name at least one worker, and each once, got \[\]"),
    (["0"], TypeError, "each of workers must be an int, got '0'"),
    (1, TypeError, "workers must be a list of worker indices, got 1"),
]


@every_case
def test_bad_workers_are_named(case: AttackCase, subtests: pytest.Subtests) -> None:
    for byzantine, error, message in BAD_WORKERS:
        with subtests.test(byzantine=byzantine), pytest.raises(error, match=message):
            case.fresh()(rows(), byzantine)


@pytest.mark.parametrize("case", [*ALL_CASES, *DATA_CASES], ids=lambda case: case.name)
def test_shows_its_arguments(case: AttackCase | DataAttackCase) -> None:
    text = repr(case.fresh())
    assert text.startswith(type(case.subject).__name__)
    assert [shown for shown in shown_arguments(case.subject) if shown not in text] == []


@every_case
def test_vectors_must_be_a_matrix(case: AttackCase) -> None:
    with pytest.raises(ValueError, match="2D tensor"):
        case.fresh()(torch.zeros(3), [0])


@every_data_case
def test_poisons_a_copy_of_the_batch(case: DataAttackCase) -> None:
    batch = copy.deepcopy(case.batch)
    poisoned = case.fresh().poison(batch)
    assert type(poisoned) is type(case.batch)
    torch.testing.assert_close(poisoned, case.poisoned, rtol=0, atol=0)
    torch.testing.assert_close(batch, case.batch, rtol=0, atol=0)


@every_data_case
def test_attacks_on_data_are_not_for_vectors(case: DataAttackCase) -> None:
    name = type(case.subject).__name__
    assert (case.subject.on_data, case.subject.on_vectors) == (True, False)
    with pytest.raises(TypeError, match=f"{name} attacks batches, not vectors: call its `poison`"):
        case.fresh()(rows(), [0])
