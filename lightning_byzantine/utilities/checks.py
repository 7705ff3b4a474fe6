"""Checks of arguments. Those of a single value return it, so that it can be checked where it is stored."""

import math
from collections.abc import Collection, Iterable
from numbers import Integral
from typing import TypeVar

import torch
from torch import Tensor

__all__ = [
    "check_at_least",
    "check_choice",
    "check_finite",
    "check_integer_at_least",
    "check_num_byzantine",
    "check_number",
    "check_positive",
    "check_probability",
    "check_vectors",
    "check_worker_indices",
]

_Choice = TypeVar("_Choice", bound=str)


def check_num_byzantine(num_byzantine: int, num_workers: int) -> None:
    """Raise unless 0 <= f < m / 2, so that honest workers are the majority.

    Example:
        >>> check_num_byzantine(4, num_workers=8)
        Traceback (most recent call last):
        ...
        ValueError: num_byzantine must satisfy 0 <= f < m / 2, got f=4 with m=8 workers

    """
    _check_integer("num_byzantine", num_byzantine)
    if not 0 <= 2 * num_byzantine < num_workers:
        raise ValueError(
            f"num_byzantine must satisfy 0 <= f < m / 2, got f={num_byzantine} with m={num_workers} workers"
        )


def check_vectors(vectors: Tensor) -> None:
    """Raise unless ``vectors`` is a non-empty floating-point [m, d] tensor.

    Example:
        >>> check_vectors(torch.zeros(3))
        Traceback (most recent call last):
        ...
        ValueError: vectors must be a 2D tensor [num_workers, dimension], got shape (3,)

    """
    if not isinstance(vectors, Tensor):
        raise TypeError(f"vectors must be a torch.Tensor [num_workers, dimension], got {type(vectors).__name__}")
    if vectors.ndim != 2:
        raise ValueError(f"vectors must be a 2D tensor [num_workers, dimension], got shape {tuple(vectors.shape)}")
    if vectors.numel() == 0:
        raise ValueError(f"vectors must not be empty, got shape {tuple(vectors.shape)}")
    if vectors.dtype not in (torch.float16, torch.bfloat16, torch.float32, torch.float64):
        raise TypeError(f"vectors must be float16, bfloat16, float32 or float64, got {vectors.dtype}")


def check_worker_indices(name: str, workers: Iterable[int], num_workers: int) -> None:
    """Raise unless ``workers`` are one or more different indices in [0, m), but not all of them.

    Example:
        >>> check_worker_indices("workers", [1, 7], num_workers=5)
        Traceback (most recent call last):
        ...
        ValueError: workers must be indices in [0, 5) for 5 workers, got 7

    """
    if not isinstance(workers, Iterable) or isinstance(workers, str):
        raise TypeError(f"{name} must be a list of worker indices, got {workers!r}")
    indices = list(workers)
    for index in indices:
        if not 0 <= _check_integer(f"each of {name}", index) < num_workers:
            raise ValueError(f"{name} must be indices in [0, {num_workers}) for {num_workers} workers, got {index}")
    if not indices or len(set(indices)) != len(indices):
        raise ValueError(f"{name} must name at least one worker, and each once, got {indices}")
    if len(indices) == num_workers:
        raise ValueError(f"{name} must leave at least one honest worker, got all {num_workers} of them: {indices}")


def check_at_least(name: str, value: float, bound: int) -> float:
    """Return ``value`` if it is a finite number of at least ``bound``; raise otherwise.

    Example:
        >>> check_at_least("std", -0.5, 0)
        Traceback (most recent call last):
        ...
        ValueError: std must be finite and at least 0, got -0.5

    """
    if not bound <= check_number(name, value) < math.inf:
        raise ValueError(f"{name} must be finite and at least {bound}, got {value}")
    return value


def check_positive(name: str, value: float) -> float:
    """Return ``value`` if it is a finite number above 0; raise otherwise.

    Example:
        >>> check_positive("max_worker_grad_norm", 0)
        Traceback (most recent call last):
        ...
        ValueError: max_worker_grad_norm must be finite and above 0, got 0

    """
    if not 0 < check_number(name, value) < math.inf:
        raise ValueError(f"{name} must be finite and above 0, got {value}")
    return value


def check_finite(name: str, value: float) -> float:
    """Return ``value`` if it is a finite number; raise otherwise.

    Example:
        >>> check_finite("factor", float("inf"))
        Traceback (most recent call last):
        ...
        ValueError: factor must be finite, got inf

    """
    if not math.isfinite(check_number(name, value)):
        raise ValueError(f"{name} must be finite, got {value}")
    return value


def check_probability(name: str, value: float) -> float:
    """Return ``value`` if it is a number in [0, 1]; raise otherwise.

    Example:
        >>> check_probability("probability", 1.5)
        Traceback (most recent call last):
        ...
        ValueError: probability must be in [0, 1], got 1.5

    """
    if not 0 <= check_number(name, value) <= 1:
        raise ValueError(f"{name} must be in [0, 1], got {value}")
    return value


def check_choice(name: str, value: _Choice, choices: Collection[str]) -> _Choice:
    """Return ``value`` if it is one of ``choices``; raise otherwise.

    Example:
        >>> check_choice("exchange", "ring", ["all_gather", "all_to_all"])
        Traceback (most recent call last):
        ...
        ValueError: exchange must be one of all_gather, all_to_all, got 'ring'

    """
    if value not in choices:
        raise ValueError(f"{name} must be one of {', '.join(choices)}, got {value!r}")
    return value


def check_integer_at_least(name: str, value: int, bound: int) -> int:
    """Return ``value`` if it is an integer of at least ``bound``; raise otherwise.

    Example:
        >>> check_integer_at_least("bucket_size", 0, 1)
        Traceback (most recent call last):
        ...
        ValueError: bucket_size must be at least 1, got 0

    """
    if _check_integer(name, value) < bound:
        raise ValueError(f"{name} must be at least {bound}, got {value}")
    return value


def check_number(name: str, value: float) -> float:
    """Return ``value`` if it is an int or a float; raise otherwise.

    Example:
        >>> check_number("beta", "high")
        Traceback (most recent call last):
        ...
        TypeError: beta must be a number, got 'high'

    """
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise TypeError(f"{name} must be a number, got {value!r}")
    return value


def _check_integer(name: str, value: int) -> int:
    if isinstance(value, bool) or not isinstance(value, Integral):
        raise TypeError(f"{name} must be an int, got {value!r}")
    return value
