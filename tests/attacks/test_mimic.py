import pytest
import torch
from cases import AttackCase, Exempt
from vectors import rows

from lightning_byzantine.attacks import Mimic

BY_INDEX = Exempt(["permutation"], because="whom it copies is named by index")
UNKNOWN = Exempt(["oracle"], because="which of the honest rows is that worker's depends on who is Byzantine")
CASES = [
    AttackCase(Mimic(), lambda honest, own: [honest[0]] * len(own), [BY_INDEX]),
    AttackCase(Mimic(worker=5), None, [BY_INDEX, UNKNOWN], name="Mimic of worker 5"),
    AttackCase(Mimic(worker=1), None, [BY_INDEX, UNKNOWN], name="Mimic of worker 1"),
]


def test_mimic_copies_the_first_honest_worker_or_the_one_that_is_named() -> None:
    assert torch.equal(Mimic()(rows(), [0, 2])[[0, 2]], rows()[[1, 1]])
    assert torch.equal(Mimic(worker=6)(rows(), [0, 2])[[0, 2]], rows()[[6, 6]])
    with pytest.raises(ValueError, match=r"worker must be an honest one, got worker=2 with \[0, 2\] Byzantine"):
        Mimic(worker=2)(rows(), [2, 0])
    with pytest.raises(ValueError, match=r"worker must be in \[0, 7\) for 7 workers, got 7"):
        Mimic(worker=7)(rows(), [0])
    with pytest.raises(ValueError, match="worker must be at least 0, got -1"):
        Mimic(worker=-1)
