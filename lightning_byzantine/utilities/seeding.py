"""Random numbers that are the same on every rank, new at every step, and exact after a resume."""

from hashlib import sha256

import torch
from torch import nn

from lightning_byzantine.utilities.checks import check_integer_at_least

__all__ = ["StepSeed"]


class StepSeed(nn.Module):
    """A fresh generator per call; the number of calls is the whole state and lies in ``state_dict``.

    Args:
        seed: non-negative integer. All ranks must have the same one.

    Example:
        >>> first, second = StepSeed(seed=1), StepSeed(seed=1)
        >>> torch.equal(torch.rand(3, generator=first.next()), torch.rand(3, generator=second.next()))
        True

    """

    def __init__(self, seed: int = 0) -> None:
        super().__init__()
        check_integer_at_least("seed", seed, 0)
        self.seed = seed
        # Not a buffer: Lightning's spawn launcher would put it in memory that all ranks share, and count for all.
        self._calls = 0

    def next(self, stream: int = 0) -> torch.Generator:
        """Return a CPU generator seeded by (seed, number of calls so far, stream).

        Args:
            stream: tells apart ranks that must not draw the same.

        """
        # torch's CPU generator looks at 32 bits of its seed only, so all numbers must have been mixed into those.
        digest = sha256(f"{self.seed},{self._calls},{stream}".encode()).digest()
        generator = torch.Generator().manual_seed(int.from_bytes(digest[:4], "big"))
        self._calls += 1
        return generator

    def happens(self, probability: float) -> bool:
        """Decide by one call whether something of this probability happens: never at 0, always at 1."""
        return bool(torch.rand((), generator=self.next()) < probability)

    def get_extra_state(self) -> int:
        """Return the number of calls so far."""
        return self._calls

    def set_extra_state(self, state: int) -> None:
        """Continue after that many calls."""
        self._calls = state

    def extra_repr(self) -> str:
        """Show the seed in ``repr``."""
        return f"seed={self.seed}"
