from typing import Any

import pytest
import torch

from lightning_byzantine.exchange.fingerprint import fingerprints, leaves, with_leaves


def state(**changes: Any) -> dict[str, Any]:
    return {
        "weight": torch.tensor([[1.0, torch.nan], [0.0, 3.0]]),
        "coarse": torch.tensor([1.0, 2.0], dtype=torch.bfloat16),
        "groups": [{"lr": 0.1, "steps": 3, "flag": True, "name": "first", "none": None, "betas": (0.9, 0.99)}],
        "empty": torch.empty(0),
    } | changes


def test_equal_states_have_equal_digests() -> None:
    assert fingerprints(state()) == fingerprints(state())
    assert fingerprints(dict(reversed(state().items()))) == fingerprints(state())
    # Objects whose text would hold an address.
    assert fingerprints(state(other=object())) == fingerprints(state(other=object()))
    transposed = torch.tensor([[1.0, 0.0], [torch.nan, 3.0]]).T
    assert fingerprints(state(weight=transposed)) == fingerprints(state())


@pytest.mark.parametrize(
    "changes",
    [
        {"weight": torch.tensor([[1.0, torch.nan], [-0.0, 3.0]])},
        {"weight": torch.tensor([[1.0, torch.nan], [3.0, 0.0]])},
        {"coarse": torch.tensor([1.0, 2.015625], dtype=torch.bfloat16)},
        {"groups": [{"lr": 0.2, "steps": 3, "flag": True, "name": "first", "none": None, "betas": (0.9, 0.99)}]},
        {"groups": [{"lr": 0.1, "steps": 3, "flag": False, "name": "first", "none": None, "betas": (0.9, 0.99)}]},
    ],
    ids=str,
)
def test_other_values_have_another_second_digest(changes: dict[str, Any]) -> None:
    layout, content = fingerprints(state(**changes))
    assert layout == fingerprints(state())[0]
    assert content != fingerprints(state())[1]


@pytest.mark.parametrize(
    "changes",
    [
        {"weight": torch.zeros(4)},
        {"weight": torch.zeros(2, 2, dtype=torch.float64)},
        {"groups": []},
        {"groups": [{"lr": 0.1, "steps": 3, "flag": True, "name": "other", "none": None, "betas": (0.9, 0.99)}]},
        {"more": 1},
    ],
    ids=str,
)
def test_other_shapes_and_names_have_another_first_digest(changes: dict[str, Any]) -> None:
    assert fingerprints(state(**changes))[0] != fingerprints(state())[0]


def test_leaves_go_out_and_in_again() -> None:
    values = [value.clone() for value in leaves(state())]
    other = state(weight=torch.zeros(2, 2), groups=[state()["groups"][0] | {"lr": 0.7, "steps": 9, "flag": False}])
    restored = with_leaves(other, iter(values))
    assert fingerprints(restored) == fingerprints(state())
    group = restored["groups"][0]
    assert (group["lr"], group["steps"], group["flag"], group["betas"]) == (0.1, 3, True, (0.9, 0.99))
    assert [type(group[key]) for key in ("lr", "steps", "flag")] == [float, int, bool]
