"""What one worker has sent in the last steps."""

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
import torch.distributed as dist
from torch import Tensor

from lightning_byzantine.aggregation.gradient_block import GradientBlock
from lightning_byzantine.exchange.collectives import start_gather
from lightning_byzantine.matrix import WorkerMatrix

__all__ = ["SentRow", "SentRows"]

# A longer row is unusable, and the worker's state does not follow it: its squared norm may overflow in float32.
_LONGEST = 1e18


@dataclass
class SentRow:
    """One worker's row, as it has arrived.

    Args:
        layouts: for each block, its parameters and their sizes; None for one that took no part in the step.
        parts: for each block, the columns that this rank has, [c'].
        is_sharded: whether every rank has other columns.
        step: of the estimator, if it counts them.

    """

    layouts: list[tuple[tuple[str | None, ...], list[int]]]
    parts: list[Tensor]
    is_sharded: bool
    step: int

    def completed(self, device: torch.device) -> "SentRow":
        """Return the row with all columns, [c]; all ranks must call this.

        Args:
            device: of the process group's tensors.

        """
        if not self.is_sharded:
            return self
        wholes = []
        for part, (_, sizes) in zip(self.parts, self.layouts, strict=True):
            wholes.append(gathered(part.to(device)).view(-1)[: sum(sizes)].cpu())
        return SentRow(self.layouts, wholes, False, self.step)

    def by_name(self) -> dict[str, Tensor]:
        """Return each parameter's part of a complete row, [n]."""
        parts: dict[str, Tensor] = {}
        for whole, (names, sizes) in zip(self.parts, self.layouts, strict=True):
            parts |= {
                name: part for name, part in zip(names, torch.split(whole, sizes), strict=True) if name is not None
            }
        return parts

    @property
    def is_usable(self) -> bool:
        """Whether a complete row can enter the state of an estimator."""
        return all(torch.linalg.vector_norm(part, dtype=torch.float64) < _LONGEST for part in self.parts)


@dataclass
class SentRows:
    """Keeps one worker's row of this step and the one before.

    Args:
        worker: the worker.
        is_sharded: whether every rank has other columns.

    Attributes:
        current: this step's row; None before the first.
        last: what this step's row follows; None if it is not known.

    """

    worker: int
    is_sharded: bool
    current: SentRow | None = field(default=None, init=False)
    last: SentRow | None = field(default=None, init=False)

    def add(self, blocks: Sequence[GradientBlock], matrix: WorkerMatrix, step: int) -> None:
        """Keep a copy of the worker's row in a step.

        Args:
            blocks: the step's blocks.
            matrix: of all rows.
            step: the estimator's step; the same one again if the optimizer has skipped the last one, which then leaves
                no trace in what the worker sends next.

        """
        if self.current is not None and self.current.step != step:
            self.last = self.current
        # In the host's memory, so that training can't run out of that of its device.
        parts = [block[self.worker].to("cpu", copy=True) for block in matrix.blocks]
        self.current = SentRow([(block.layout, block.sizes) for block in blocks], parts, self.is_sharded, step)


def gathered(own: Tensor) -> Tensor:
    """Return every rank's flat tensor, [ranks, n]: each directly from its rank, so that no other can change it."""
    received = own.new_empty(dist.get_world_size(), own.numel())
    for wait in start_gather(received.view(-1), own.contiguous()):
        wait()
    return received
