"""Leaves of nested states, and digests to compare them between ranks."""

from collections.abc import Iterator
from hashlib import sha256
from typing import Any

import torch
from torch import Tensor

__all__ = ["fingerprints", "leaves", "with_leaves"]

_NUMBERS = {bool: torch.int64, int: torch.int64, float: torch.float64}


def leaves(state: Any) -> list[Tensor]:
    """Return the tensors and numbers of a nested state, the numbers as tensors of shape [].

    Args:
        state: dicts (read in sorted order of their keys), lists and tuples, nested to any depth.

    Example:
        >>> leaves({"step": 3, "groups": [{"lr": 0.5, "name": "first"}]})
        [tensor(0.5000, dtype=torch.float64), tensor(3)]

    """
    return [leaf for _, leaf in _walk(state, "") if isinstance(leaf, Tensor)]


def with_leaves(state: Any, values: Iterator[Tensor]) -> Any:
    """Return the state with its :func:`leaves` replaced by other values.

    Args:
        state: as for :func:`leaves`.
        values: one for each leaf, of its shape, in the order of :func:`leaves`.

    Example:
        >>> with_leaves({"step": 3, "groups": [{"lr": 0.5, "name": "first"}]}, iter(torch.tensor([0.25, 4])))
        {'groups': [{'lr': 0.25, 'name': 'first'}], 'step': 4}

    """
    if isinstance(state, dict):
        return {key: with_leaves(state[key], values) for key in sorted(state, key=str)}
    if isinstance(state, list | tuple):
        return type(state)([with_leaves(value, values) for value in state])
    if isinstance(state, Tensor):
        return next(values).to(state)
    return type(state)(next(values).item()) if type(state) in _NUMBERS else state


def fingerprints(state: Any) -> tuple[bytes, bytes]:
    """Return two digests of 32 bytes: of the structure of a state, and of its values, bit by bit.

    Of objects other than tensors, numbers, strings and None, only the type counts: a ``repr`` may contain addresses.

    Args:
        state: as for :func:`leaves`.

    Example:
        >>> first, second = fingerprints({"weight": torch.zeros(2)}), fingerprints({"weight": -torch.zeros(2)})
        >>> first[0] == second[0], first[1] == second[1]
        (True, False)

    """
    layout, content = list[str](), sha256()
    for place, leaf in _walk(state, ""):
        if isinstance(leaf, Tensor):
            layout.append(f"{place} {leaf.dtype} {tuple(leaf.shape)}\n")
            content.update(leaf.detach().reshape(-1).cpu().view(torch.uint8).numpy().data)
        else:
            layout.append(f"{place} {leaf}\n")
    return sha256("".join(layout).encode()).digest(), content.digest()


def _walk(state: Any, place: str) -> Iterator[tuple[str, Tensor | str]]:
    """Yield the path of each leaf, with the tensor or a description of the object."""
    if isinstance(state, dict):
        for key in sorted(state, key=str):
            yield from _walk(state[key], f"{place}/{key}")
    elif isinstance(state, list | tuple):
        yield place, f"{type(state).__name__} of {len(state)}"
        for index, value in enumerate(state):
            yield from _walk(value, f"{place}/{index}")
    elif isinstance(state, Tensor):
        yield place, state
    elif type(state) in _NUMBERS:
        yield place, torch.tensor(state, dtype=_NUMBERS[type(state)])
    else:
        yield place, repr(state) if isinstance(state, str | bytes | None) else type(state).__name__
