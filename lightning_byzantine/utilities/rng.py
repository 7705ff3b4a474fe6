"""Random numbers that are the same on every rank, after a resume, or in a second run of the same code."""

import random
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from hashlib import sha256
from typing import Any

import numpy as np  # comes with torchmetrics
import torch
from torch import Tensor

from lightning_byzantine.utilities.checks import check_integer_at_least
from lightning_byzantine.utilities.showing_arguments import ShowsArguments

__all__ = ["StepSeed", "random_state", "replayed_rng", "set_random_state"]


class StepSeed(ShowsArguments):
    """A new generator for each call, the same on every rank.

    Its only state is the number of calls, which is part of the ``state_dict``.

    Args:
        seed: non-negative integer. All ranks must have the same one.

    Example:
        >>> first, second = StepSeed(seed=1), StepSeed(seed=1)
        >>> torch.equal(torch.rand(3, generator=first.next()), torch.rand(3, generator=second.next()))
        True

    """

    def __init__(self, seed: int = 0) -> None:
        super().__init__()
        self.seed = check_integer_at_least("seed", seed, 0)
        # Not a buffer: Lightning's spawn launcher moves buffers to shared memory, where all ranks would count in one.
        self._calls = 0

    def next(self, stream: int = 0) -> torch.Generator:
        """Return a CPU generator seeded by (seed, number of calls so far, stream).

        Args:
            stream: a different number for each rank that must draw different values.

        """
        # torch's CPU generator uses only 32 bits of its seed, so all three numbers are hashed into those.
        digest = sha256(f"{self.seed},{self._calls},{stream}".encode()).digest()
        generator = torch.Generator().manual_seed(int.from_bytes(digest[:4], "big"))
        self._calls += 1
        return generator

    def happens(self, probability: float) -> bool:
        """Return True with this probability; uses one call."""
        return bool(torch.rand((), generator=self.next()) < probability)

    def get_extra_state(self) -> int:
        """Return the number of calls so far."""
        return self._calls

    def set_extra_state(self, state: int) -> None:
        """Restore the number of calls."""
        self._calls = state


@contextmanager
def replayed_rng(device: torch.device) -> Iterator[None]:
    """Restore the random state of torch, numpy and Python on exit, so that the same numbers are drawn again.

    Args:
        device: if it is not the CPU, its generator is restored as well.

    Example:
        >>> with replayed_rng(torch.device("cpu")):
        ...     first = torch.rand(1)
        >>> torch.equal(torch.rand(1), first)
        True

    """
    devices = [] if device.type == "cpu" else [device]
    python_state, numpy_state = random.getstate(), np.random.get_state()
    with torch.random.fork_rng(devices, device_type=device.type if devices else "cuda"):
        try:
            yield
        finally:
            random.setstate(python_state)
            np.random.set_state(numpy_state)


def random_state(device: torch.device) -> list[Tensor]:
    """Return the random state of torch, Python and numpy as tensors on the CPU, for :func:`set_random_state`.

    Args:
        device: if it is not the CPU, the state of its generator is the last tensor.

    Raises:
        ValueError: if numpy's global generator was replaced by one of another kind.

    """
    version, words, gauss = random.getstate()
    numpy: Any = np.random.get_state(legacy=False)
    if numpy["bit_generator"] != "MT19937":
        raise ValueError(f"numpy's global generator must be a MT19937, got {numpy['bit_generator']}")
    normals = [gauss is not None, gauss or 0.0, numpy["has_gauss"], numpy["gauss"]]
    states = [
        torch.get_rng_state(),
        torch.tensor([version, *words]),
        torch.tensor([*numpy["state"]["key"].tolist(), numpy["state"]["pos"]]),
        torch.tensor(normals, dtype=torch.float64),
    ]
    return states if device.type == "cpu" else [*states, torch.get_device_module(device).get_rng_state(device)]


def set_random_state(device: torch.device, states: Sequence[Tensor]) -> None:
    """Set what :func:`random_state` has returned, perhaps in another process.

    Args:
        device: as for :func:`random_state`.
        states: the tensors. Their shapes and dtypes must be right; values that no generator has raise an error.

    Raises:
        ValueError: if Python or numpy refuse the state; OverflowError likewise.
        RuntimeError: if torch does.

    Example:
        >>> states = random_state(torch.device("cpu"))
        >>> first = torch.rand(1), random.gauss(), np.random.rand()
        >>> set_random_state(torch.device("cpu"), states)
        >>> first == (torch.rand(1), random.gauss(), np.random.rand())
        True

    """
    own, (version, *words), (*key, position), normals = (state.tolist() for state in states[:4])
    if not 0 <= position <= len(key):  # numpy does not check, and would read past its state
        raise ValueError(f"numpy's position must be in [0, {len(key)}], got {position}")
    torch.set_rng_state(torch.tensor(own, dtype=torch.uint8))
    random.setstate((version, tuple(words), normals[1] if normals[0] else None))
    numpy = {"key": np.array(key, dtype=np.uint32), "pos": position}
    np.random.set_state({"bit_generator": "MT19937", "state": numpy, "has_gauss": int(normals[2]), "gauss": normals[3]})
    if device.type != "cpu":
        torch.get_device_module(device).set_rng_state(states[4].cpu(), device)
