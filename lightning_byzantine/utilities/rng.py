"""Random numbers that a second run of the same code draws again."""

import random
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np  # comes with torchmetrics
import torch

__all__ = ["replayed_rng"]


@contextmanager
def replayed_rng(device: torch.device) -> Iterator[None]:
    """Put the generators of torch, numpy and Python back at the end to where they were at the start.

    Args:
        device: its generator too, where it is not the CPU.

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
