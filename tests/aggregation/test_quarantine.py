import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lightning_byzantine import EquivocationError
from lightning_byzantine.aggregation.quarantine import Quarantine, rank_errors
from lightning_byzantine.aggregators import Bulyan, CoordinateWiseMedian, Mean
from lightning_byzantine.matrix import WorkerMatrix

M = 9


@given(
    f=st.integers(0, 4),
    expelled=st.lists(st.tuples(st.integers(0, M - 1), st.booleans()), max_size=M - 1),
)
def test_only_proof_lets_the_others_trust_each_other_more(f: int, expelled: list[tuple[int, bool]]) -> None:
    quarantine = Quarantine()
    for worker, proved in expelled:
        quarantine.add([worker], Mean(), M, f, proved=proved)
    left = M - len({worker for worker, _ in expelled})
    by_proof = len({worker for worker, proved in expelled if proved})
    remaining = quarantine.remaining_byzantine(M, f)
    assert remaining >= 0 and (2 * remaining < left)
    assert remaining <= max(0, f - by_proof)
    # As many as may be left, if so many can be told from the others at all.
    assert remaining == max(0, f - by_proof) or 2 * (remaining + 1) >= left
    matrix = WorkerMatrix([torch.arange(float(M))[:, None]])
    rows = quarantine.without(matrix)
    assert rows.num_workers == left
    assert set(rows.workers.tolist()).isdisjoint(quarantine.workers)


def test_proof_may_come_later() -> None:
    quarantine = Quarantine()
    quarantine.add([3, 5], CoordinateWiseMedian(), M, 2)
    quarantine.add([5], CoordinateWiseMedian(), M, 2, proved=True)
    assert (quarantine.workers, quarantine.proved) == ({3, 5}, {5})
    assert quarantine.remaining_byzantine(M, 2) == 1


def test_what_leaves_the_rule_too_few_changes_nothing() -> None:
    quarantine = Quarantine()
    # Bulyan needs 4 f + 3 workers: 11 with f=2, of which none can be spared unless it was one of the two.
    with pytest.raises(ValueError, match="Bulyan needs m"):
        quarantine.add([0], Bulyan(), 11, 2)
    assert quarantine.workers == frozenset()
    quarantine.add([0], Bulyan(), 11, 2, proved=True)
    with pytest.raises(ValueError, match="Bulyan needs m"):
        quarantine.add([1, 2, 3, 4], Bulyan(), 11, 2)
    assert (quarantine.workers, quarantine.proved) == ({0}, {0})


def test_an_error_about_ranks_names_them() -> None:
    message = "rank 4 told others different things, and can't be left out: Bulyan needs m"
    with pytest.raises(EquivocationError, match=message) as caught, rank_errors({4}):
        Quarantine().add([0], Bulyan(), 11, 2)
    assert caught.value.ranks == [4]
