"""Old news."""

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from lightning_byzantine.attacks.attack import VectorAttack, replace_rows
from lightning_byzantine.matrix import WorkerMatrix
from lightning_byzantine.utilities.checks import check_integer_at_least

__all__ = ["StaleGradient"]


@dataclass(frozen=True)
class _Kept:
    """What the Byzantine workers computed in one step, and which columns of which rows that is."""

    place: tuple[Any, ...]
    blocks: list[Tensor]


class StaleGradient(VectorAttack):
    """Each Byzantine worker sends its own estimate of ``delay`` steps ago, as one that can't keep up.

    Until there is one that old, it sends the first. DDP changes the order of the columns once, after a process's first
    step: estimates in another order than the present one are passed over, and the oldest of the others is sent.
    Estimates of ``delay`` + 1 steps are kept, and are in the checkpoint; but where ranks hold different columns, with
    ``exchange="all_to_all"``, a resumed run starts with none, for the checkpoint has those of one rank only.

    Args:
        delay: how many steps.

    Source: Damaskinos et al., "Asynchronous Byzantine Machine Learning (the case of SGD)", ICML 2018, on workers that
    are too late.

    Example:
        >>> import torch
        >>> attack = StaleGradient(delay=2)
        >>> [attack(torch.tensor([[float(step)], [7.0]]), byzantine=[0])[0].item() for step in range(5)]
        [0.0, 0.0, 0.0, 1.0, 2.0]

    """

    def __init__(self, delay: int) -> None:
        super().__init__()
        check_integer_at_least("delay", delay, 1)
        self.delay = delay
        self._kept: deque[_Kept] = deque(maxlen=delay + 1)
        self._is_resumed = False

    def extra_repr(self) -> str:
        """Show the argument in ``repr``."""
        return f"delay={self.delay}"

    def tamper(self, matrix: WorkerMatrix, byzantine: Sequence[int]) -> WorkerMatrix:
        """Return a matrix with old estimates in the Byzantine rows, and keep the present ones."""
        if self._is_resumed:
            self._forget_if_sharded(matrix)
        rows = sorted(byzantine)
        place = (matrix.layout, matrix.shard, tuple(rows), tuple(block.shape[1] for block in matrix.blocks))
        self._kept.append(_Kept(place, [block[rows] for block in matrix.blocks]))
        oldest = next(kept for kept in self._kept if kept.place == place)
        parts = iter(oldest.blocks)
        return replace_rows(matrix, rows, lambda block, _: next(parts).to(block.device))

    def get_extra_state(self) -> list[tuple[tuple[Any, ...], list[Tensor]]]:
        """Return the estimates that were kept, oldest first."""
        return [(kept.place, kept.blocks) for kept in self._kept]

    def set_extra_state(self, state: list[tuple[tuple[Any, ...], list[Tensor]]]) -> None:
        """Continue with estimates that were kept."""
        self._kept = deque((_Kept(place, blocks) for place, blocks in state), maxlen=self.delay + 1)
        self._is_resumed = True

    def _forget_if_sharded(self, matrix: WorkerMatrix) -> None:
        # The checkpoint has the columns of the rank that wrote it. If others need others, all ranks have to forget.
        self._is_resumed = False
        is_foreign = float(any(kept.place[1] != matrix.shard for kept in self._kept))
        if matrix.map_blocks(lambda block: block.new_full((1, 1), is_foreign)).squared_norms().item() > 0:
            self._kept.clear()
