"""What code may change in the objects it can reach, and how to undo it."""

import random
import sys
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from types import SimpleNamespace
from typing import Any

import numpy as np  # comes with torchmetrics
import torch
from torch import Tensor, nn

__all__ = ["Snapshot"]

_ATOMS = frozenset({bool, bytes, complex, float, int, str, type(None), torch.device, torch.dtype, torch.Size})

# Their objects belong to the machinery around a model, and reach far beyond it.
_MACHINERY = sys.stdlib_module_names | {
    "lightning",
    "lightning_byzantine",
    "lightning_fabric",
    "numpy",
    "pytorch_lightning",
    "torch",
}

# Hooks and the like, which a module registers in its constructor, and many of them.
_HOOKS = frozenset(vars(nn.Module())) - {"training", "_parameters", "_buffers", "_modules"}


class Snapshot:
    """Remembers modules, containers, tensors and generators, and all that is reachable from them through one another.

    Goes through modules (with torchmetrics' metrics), lists, dicts, sets, deques, tuples, tensors, numpy arrays, random
    generators, and the attributes of other objects but those of torch, Lightning and Python's library. Objects keep
    their identity: :meth:`restore` puts back what they hold. Trainable parameters are not copied.

    Args:
        root: where to start.
        copy_tensors: whether tensors and arrays can be restored; otherwise, :attr:`changed` tells only.

    Attributes:
        modules: those that were met.
        iterators: those that were met, which nobody can put back.

    Example:
        >>> state = {"losses": [1.0], "count": torch.zeros(1)}
        >>> snapshot = Snapshot(state)
        >>> state["losses"].append(2.0)
        >>> state["count"] += 1
        >>> snapshot.restore()
        >>> state
        {'losses': [1.0], 'count': tensor([0.])}

    """

    def __init__(self, root: Any, copy_tensors: bool = True) -> None:
        self.modules: list[nn.Module] = []
        self.iterators: list[Iterator[Any]] = []
        self._copy_tensors = copy_tensors
        self._undo: list[Callable[[], Any]] = []
        self._versions: list[tuple[Tensor, int]] = []
        self._arrays: list[tuple[np.ndarray, bytes]] = []
        self._seen: dict[int, Any] = {}  # keeps what it has seen alive, for ids to stay unique
        pending = [root]
        while pending:
            pending.extend(value for value in self._visit(pending.pop()) if type(value) not in _ATOMS)

    @property
    def changed(self) -> list[Tensor | np.ndarray]:
        """Tensors, parameters included, and arrays that were written to since; arrays if they are not restored."""
        tensors = [tensor for tensor, version in self._versions if tensor._version != version]
        return [*tensors, *(array for array, content in self._arrays if array.tobytes() != content)]

    def restore(self) -> None:
        """Put everything back."""
        for undo in self._undo:
            undo()

    def _visit(self, value: Any) -> Iterable[Any]:
        if id(value) in self._seen:
            return ()
        self._seen[id(value)] = value
        if isinstance(value, Tensor):
            return self._visit_tensor(value)
        if isinstance(value, nn.Module):
            self.modules.append(value)
            return self._visit_dict(vars(value), skip=_HOOKS)
        if isinstance(value, dict):
            return self._visit_dict(value)
        if isinstance(value, tuple):
            return value
        if isinstance(value, list | deque | set):
            return self._visit_collection(value)
        if self._visit_leaf(value):
            return ()
        known = type(value).__module__.partition(".")[0] in _MACHINERY
        if (
            hasattr(value, "__dict__")
            and not isinstance(value, type)
            and (not known or isinstance(value, SimpleNamespace))
        ):
            return self._visit_dict(vars(value))
        return ()

    def _visit_tensor(self, tensor: Tensor) -> Iterable[Any]:
        if tensor.is_inference():  # keeps no version, and can't be written to outside of inference mode
            return ()
        self._versions.append((tensor, tensor._version))
        if tensor.is_leaf and not isinstance(tensor, nn.Parameter):
            self._undo.append(partial(_set_gradient, tensor, tensor.requires_grad, tensor.grad))
        is_trainable = isinstance(tensor, nn.Parameter) and tensor.requires_grad
        # Whatever their versions say: batch normalisation, and all that goes through `.data`, leaves none. Nobody can
        # write to an expanded tensor.
        if self._copy_tensors and not is_trainable and not _is_expanded(tensor):
            self._undo.append(partial(tensor.detach().copy_, tensor.detach().clone()))
        return ()

    def _visit_dict(self, value: dict[Any, Any], skip: frozenset[str] = frozenset()) -> Iterable[Any]:
        items = dict(value)

        def undo() -> None:
            if list(map(id, value)) == list(map(id, items)) and all(value[key] is items[key] for key in items):
                return
            value.clear()
            value.update(items)

        self._undo.append(undo)
        return [item for key, item in items.items() if key not in skip]

    def _visit_collection(self, value: list[Any] | deque[Any] | set[Any]) -> Iterable[Any]:
        items = list(value)

        def undo() -> None:
            value.clear()
            value.update(items) if isinstance(value, set) else value.extend(items)

        self._undo.append(undo)
        return items

    def _visit_leaf(self, value: Any) -> bool:
        if isinstance(value, np.ndarray):
            if not self._copy_tensors:
                self._arrays.append((value, value.tobytes()))
            elif value.flags.writeable:
                array = value.copy()
                self._undo.append(lambda: np.copyto(value, array))
        elif isinstance(value, torch.Generator):
            state = value.get_state()
            self._undo.append(lambda: value.set_state(state))
        elif isinstance(value, np.random.Generator):
            position = value.bit_generator.state
            self._undo.append(lambda: setattr(value.bit_generator, "state", position))
        elif isinstance(value, np.random.RandomState):
            numbers = value.get_state()
            self._undo.append(lambda: value.set_state(numbers))
        elif isinstance(value, random.Random):
            place = value.getstate()
            self._undo.append(lambda: value.setstate(place))
        elif isinstance(value, Iterator):
            self.iterators.append(value)
        else:
            return False
        return True


def _set_gradient(tensor: Tensor, requires_grad: bool, gradient: Tensor | None) -> None:
    tensor.requires_grad_(requires_grad)
    tensor.grad = gradient


def _is_expanded(tensor: Tensor) -> bool:
    return any(stride == 0 and size > 1 for stride, size in zip(tensor.stride(), tensor.shape, strict=True))
