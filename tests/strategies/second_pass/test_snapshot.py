from collections import OrderedDict, deque
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from torchmetrics import CatMetric

from lightning_byzantine.strategies.second_pass.snapshot import Snapshot


class Own:
    def __init__(self) -> None:
        self.values = [1]


def change_list(value: list[Any]) -> None:
    value[0].append(3)
    value.append(4)


def change_module(module: nn.Module) -> None:
    module.running_mean.data.add_(1)
    module.eps = 1.0
    module.new = "attribute"
    module.eval()


CASES = {
    "nested lists": (lambda: [[1, 2], 3], change_list, str),
    "dict": (lambda: OrderedDict(a=1, b=2), lambda value: (value.pop("a"), value.update(c=3)), str),
    "set": (lambda: {1, 2}, lambda value: value.clear(), str),
    "bounded deque": (lambda: deque([1, 2], maxlen=2), lambda value: value.append(3), str),
    "tuple of a list": (lambda: ([1],), lambda value: value[0].append(2), str),
    "tensor": (lambda: torch.zeros(2), lambda value: value.add_(1), str),
    "tensor through data": (lambda: torch.zeros(2), lambda value: value.data.add_(1), str),
    "array": (lambda: np.zeros(2), lambda value: value.fill(1), str),
    "generator": (lambda: torch.Generator().manual_seed(1), lambda value: torch.rand(1, generator=value), torch.rand),
    "own object": (Own, lambda value: value.values.append(2), lambda value: str(value.values)),
    "namespace": (lambda: SimpleNamespace(a=[1]), lambda value: value.a.append(2), str),
    "frozen parameter": (
        lambda: nn.Linear(1, 1, bias=False).requires_grad_(False),
        lambda value: value.weight.data.add_(1),
        lambda value: value.weight.tolist(),
    ),
    "module": (lambda: nn.BatchNorm1d(2), change_module, lambda value: (str(vars(value)), str(value.running_mean))),
    "metric": (CatMetric, lambda value: value.update(1.0), lambda value: (len(value.value), value.update_count)),
}


@pytest.mark.parametrize("name", CASES)
def test_puts_everything_back_into_the_same_objects(name: str) -> None:
    make, change, show = CASES[name]
    if show is torch.rand:
        show = lambda value: float(torch.rand(1, generator=value.clone_state()))  # noqa: E731
    value = make()
    before = show(value)
    holder = {"value": value, "again": value}
    snapshot = Snapshot(holder)
    change(value)
    assert show(value) != before
    holder.pop("again")
    snapshot.restore()
    assert holder == {"value": value, "again": value}
    assert show(value) == before


def test_tells_which_tensors_were_written_to() -> None:
    tensors = [torch.zeros(1), nn.Parameter(torch.zeros(1)), torch.zeros(1)]
    arrays = [np.zeros(1), np.full(1, np.nan)]
    snapshot = Snapshot([tensors, arrays], copy_tensors=False)
    tensors[0] += 1
    with torch.no_grad():
        tensors[1] += 1
    arrays[0] += 1
    snapshot.restore()
    assert {id(tensor) for tensor in snapshot.changed} == {id(tensors[0]), id(tensors[1]), id(arrays[0])}
    assert tensors[0] == 1


def test_goes_around_in_circles_once_and_names_iterators() -> None:
    circle: list[Any] = [iter([1, 2])]
    circle.append(circle)
    snapshot = Snapshot(circle)
    snapshot.restore()
    assert snapshot.iterators == [circle[0]]


def test_leaves_the_machinery_alone() -> None:
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=0.1)
    snapshot = Snapshot({"optimizer": optimizer})
    optimizer.param_groups[0]["lr"] = 0.2
    snapshot.restore()
    assert optimizer.param_groups[0]["lr"] == 0.2


def test_takes_back_gradients_of_what_is_no_parameter() -> None:
    inputs = torch.ones(2)
    snapshot = Snapshot([inputs], copy_tensors=False)
    inputs.requires_grad_().square().sum().backward()
    snapshot.restore()
    assert inputs.grad is None
    assert not inputs.requires_grad
