from collections import namedtuple
from typing import Any

import pytest
import torch
from cases import DataAttackCase

from lightning_byzantine.attacks import LabelFlip

CASES = [
    DataAttackCase(
        LabelFlip(num_classes=10),
        batch=(torch.zeros(3), torch.tensor([0, 1, 9])),
        poisoned=(torch.zeros(3), torch.tensor([9, 8, 0])),
    )
]

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
