"""The state of all objects that code can reach from one of them, and how to restore it."""

import pickle
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

from lightning_byzantine.utilities.torch_internals import version_of

__all__ = ["Snapshot", "TooManyObjectsError"]

_ATOMS = frozenset({bool, bytes, complex, float, int, str, type(None), torch.device, torch.dtype, torch.Size})

# Attributes of these packages' objects are not visited: they belong to the framework, and refer to far more objects.
_FRAMEWORK = sys.stdlib_module_names | {
    "lightning",
    "lightning_byzantine",
    "lightning_fabric",
    "numpy",
    "pytorch_lightning",
    "torch",
}

# Hooks and similar dictionaries that each module has, and that a training step does not change.
_HOOKS = frozenset(vars(nn.Module())) - {"training", "_parameters", "_buffers", "_modules"}


class TooManyObjectsError(Exception):
    """Visiting all objects would take too long."""


class Snapshot:
    """Remembers the state of an object and of all objects that it refers to, directly or not.

    Covers modules (torchmetrics' metrics included), lists, dicts, sets, deques, tuples, tensors, numpy arrays, random
    generators, and the attributes of other objects, except those of torch, Lightning and Python's standard library.
    :meth:`restore` restores their contents; the objects stay the same. Trainable parameters are not copied.

    Args:
        root: where to start.
        copy_tensors: whether to copy tensors and arrays, so that they can be restored. Without copies, :attr:`changed`
            still reports writes to them.
        watch_arrays: whether it does so for arrays, which takes a copy of them as well.
        most: maximum number of objects to visit; None for any.

    Attributes:
        modules: all modules that were found.
        iterators: all iterators that were found; they can't be restored.

    Raises:
        TooManyObjectsError: if there are more objects than ``most``.

    Example:
        >>> state = {"losses": [1.0], "count": torch.zeros(1)}
        >>> snapshot = Snapshot(state)
        >>> state["losses"].append(2.0)
        >>> state["count"] += 1
        >>> snapshot.restore()
        >>> state
        {'losses': [1.0], 'count': tensor([0.])}

    """

    def __init__(
        self, root: Any, copy_tensors: bool = True, watch_arrays: bool = True, most: int | None = None
    ) -> None:
        self.modules: list[nn.Module] = []
        self.iterators: list[Iterator[Any]] = []
        self._copy_tensors = copy_tensors
        self._watch_arrays = watch_arrays
        self._undo: list[Callable[[], Any]] = []
        self._versions: list[tuple[Tensor, int]] = []
        self._arrays: list[tuple[np.ndarray, bytes]] = []
        self._generators: list[tuple[Callable[[], Any], bytes]] = []
        self._seen: dict[int, Any] = {}  # holds references, because the id of a deleted object can be used again
        pending, num_visited = [root], 0
        while pending:
            found = list(self._visit(pending.pop()))
            num_visited += len(found)
            if most is not None and num_visited > most:
                raise TooManyObjectsError(f"the module refers to more than {most} objects")
            pending.extend(value for value in found if type(value) not in _ATOMS)

    @property
    def changed(self) -> list[Tensor | np.ndarray]:
        """Tensors and parameters that were written to since then; without ``copy_tensors`` arrays as well."""
        tensors = [tensor for tensor, version in self._versions if version_of(tensor) != version]
        return [*tensors, *(array for array, content in self._arrays if array.tobytes() != content)]

    @property
    def has_drawn(self) -> bool:
        """Whether random numbers were drawn since then from one of the generators that were found."""
        return any(_pickled(state()) != before for state, before in self._generators)

    def restore(self) -> None:
        """Restore everything that was remembered."""
        for undo in self._undo:
            undo()

    def _visit(self, value: Any) -> Iterable[Any]:
        if id(value) in self._seen:
            return ()
        self._seen[id(value)] = value
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
        return self._visit_dict(vars(value)) if _has_own_state(value) else ()

    def _visit_tensor(self, tensor: Tensor) -> None:
        if tensor.is_inference():  # has no version, and can't be written to outside of inference mode
            return
        self._versions.append((tensor, version_of(tensor)))
        if tensor.is_leaf and not isinstance(tensor, nn.Parameter):
            self._undo.append(partial(tensor.requires_grad_, tensor.requires_grad))
            self._undo.append(partial(setattr, tensor, "grad", tensor.grad))
        is_trainable = isinstance(tensor, nn.Parameter) and tensor.requires_grad
        # Versions do not show which tensors to restore: writes by batch normalization and through `.data` don't count.
        # Expanded tensors can't be written to.
        if self._copy_tensors and not is_trainable and not _is_expanded(tensor):
            self._undo.append(partial(tensor.detach().copy_, tensor.detach().clone()))

    def _visit_array(self, array: np.ndarray) -> None:
        if self._copy_tensors and array.flags.writeable:
            self._undo.append(partial(np.copyto, array, array.copy()))
        elif not self._copy_tensors and self._watch_arrays:
            self._arrays.append((array, array.tobytes()))

    def _visit_dict(self, value: dict[Any, Any], skip: frozenset[str] = frozenset()) -> Iterable[Any]:
        items = dict(value)

        def undo() -> None:
            if list(map(id, value)) != list(map(id, items)) or any(value[key] is not items[key] for key in items):
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
        if isinstance(value, Tensor):
            self._visit_tensor(value)
        elif isinstance(value, np.ndarray):
            self._visit_array(value)
        elif isinstance(value, torch.Generator | np.random.RandomState):
            state: Any = value.get_state()
            self._undo.append(partial(value.set_state, state))
            self._generators.append((value.get_state, _pickled(state)))
        elif isinstance(value, np.random.Generator):
            bits = value.bit_generator
            self._undo.append(partial(setattr, bits, "state", bits.state))
            self._generators.append((lambda: bits.state, _pickled(bits.state)))
        elif isinstance(value, random.Random):
            self._undo.append(partial(value.setstate, value.getstate()))
            self._generators.append((value.getstate, _pickled(value.getstate())))
        elif isinstance(value, Iterator):
            self.iterators.append(value)
        else:
            return False
        return True


def _has_own_state(value: Any) -> bool:
    if isinstance(value, type) or not hasattr(value, "__dict__"):
        return False
    package = type(value).__module__.partition(".")[0]
    return package not in _FRAMEWORK or isinstance(value, SimpleNamespace)


def _pickled(state: Any) -> bytes:
    # To compare: some states are nested, with tensors or arrays at different places.
    return pickle.dumps(state)


def _is_expanded(tensor: Tensor) -> bool:
    return any(stride == 0 and size > 1 for stride, size in zip(tensor.stride(), tensor.shape, strict=True))
