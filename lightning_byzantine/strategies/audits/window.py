"""When a worker is audited."""

import secrets
from collections.abc import Sequence

import torch
from torch import Tensor

__all__ = ["AuditWindow", "draw_nonce"]

# An audit takes place in one of these steps, the first one excepted.
_LENGTH = 8


class AuditWindow:
    """Some steps, in one of which a worker is audited; nobody knows in which before the worker's row has arrived.

    In each step of the window all ranks reveal a random number after they have received all rows. That of one rank
    decides whether the audit takes place in this step, each time another rank's. So a worker that lies in its rows
    can't behave well in the step of its audit only, unless that rank tells it the number before, and then it lies
    unseen in one window of m - 1 at most for each accomplice. If all numbers were combined, who reveals last could
    choose.

    A worker that lies in some steps can behave well throughout its windows, which it knows. Faults don't.

    In the first step, only what the worker sends is kept: its next row follows from it.

    Args:
        worker: the worker.
        turn: number of the window, which says whose number decides.

    Attributes:
        worker: as given.

    Example:
        >>> window = AuditWindow(worker=3, turn=0)
        >>> [window.is_drawn([nonce, 5]) for nonce in (0, 1, 12)]  # the first is never drawn
        [False, False, True]

    """

    def __init__(self, worker: int, turn: int) -> None:
        self.worker = worker
        self._turn = turn
        self._left = _LENGTH

    def is_drawn(self, nonces: Sequence[int]) -> bool:
        """Count a step, and return whether the worker is audited in it.

        Args:
            nonces: the random numbers of the ranks that take turns.

        """
        self._left -= 1
        return self._left < _LENGTH - 1 and nonces[self._turn % len(nonces)] % (self._left + 1) == 0


def draw_nonce() -> Tensor:
    """Return a random number, [1] int64, without any generator of torch, on whose state training depends."""
    return torch.tensor([secrets.randbits(62)])
