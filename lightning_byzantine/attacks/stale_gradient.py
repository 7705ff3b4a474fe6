"""Estimates of an earlier step."""

from collections import deque
from collections.abc import Sequence
from typing import Any

from torch import Tensor

from lightning_byzantine.attacks.attack import VectorAttack, replace_rows
from lightning_byzantine.matrix import WorkerMatrix
from lightning_byzantine.utilities.checks import check_integer_at_least

__all__ = ["StaleGradient"]


class StaleGradient(VectorAttack):
    """Each Byzantine worker sends its own estimate of ``delay`` steps ago, like a worker that can't keep up.

    Until there is one that old, it sends the first. DDP changes the order of the columns once, after a process's first
    step; estimates in another order than the current one are skipped, and the oldest of the others is sent. The kept
    estimates, of ``delay`` + 1 steps, are not part of the ``state_dict``: a resumed run starts with none.

    Args:
        delay: number of steps.

    Source: Damaskinos et al., "Asynchronous Byzantine Machine Learning (the case of SGD)", ICML 2018, on stale
    workers.

    Example:
        >>> import torch
        >>> attack = StaleGradient(delay=2)
        >>> [attack(torch.tensor([[float(step)], [7.0]]), byzantine=[0])[0].item() for step in range(5)]
        [0.0, 0.0, 0.0, 1.0, 2.0]

    """

    def __init__(self, delay: int) -> None:
        super().__init__()
        self.delay = check_integer_at_least("delay", delay, 1)
        # Per step: which rows and columns, in which order, and what the Byzantine workers computed.
        self._kept: deque[tuple[tuple[Any, ...], list[Tensor]]] = deque(maxlen=delay + 1)

    def tamper(self, matrix: WorkerMatrix, byzantine: Sequence[int]) -> WorkerMatrix:
        """Return a matrix with old estimates in the Byzantine rows, and keep the current ones."""
        rows = sorted(byzantine)
        columns = (matrix.layout, matrix.shard, tuple(rows), tuple(block.shape[1] for block in matrix.blocks))
        self._kept.append((columns, [block[rows] for block in matrix.blocks]))
        oldest = iter(next(blocks for kept_columns, blocks in self._kept if kept_columns == columns))
        return replace_rows(matrix, rows, lambda honest, own: next(oldest))
