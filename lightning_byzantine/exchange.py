"""Collectives: from every worker's own vector to the matrix of all of them."""

from typing import Protocol

import torch
import torch.distributed as dist
from torch import Tensor

from lightning_byzantine.matrix import WorkerMatrix

__all__ = ["AllGather", "Exchange", "gather", "gather_to_first"]


class Exchange(Protocol):
    """One exchange a step: :meth:`start` for every block of the worker's vector, then :meth:`finish` once."""

    def start(self, block: Tensor) -> None:
        """Begin to send one block [c], which must not be written to before :meth:`finish` returned."""

    def finish(self) -> WorkerMatrix:
        """Wait for all blocks and return them as a matrix, in the order they were started."""


class AllGather:
    """Every rank receives every worker's vector and aggregates for itself: it trusts nobody's values.

    A rank moves (m - 1) d elements and holds m d. A single worker needs no process group.

    Args:
        num_workers: number of ranks, m.

    Example:
        >>> exchange = AllGather(num_workers=1)
        >>> exchange.start(torch.tensor([1.0, 2.0]))
        >>> exchange.finish().num_workers
        1

    """

    def __init__(self, num_workers: int) -> None:
        self.num_workers = num_workers
        self._started: list[tuple[Tensor, dist.Work | None]] = []

    def start(self, block: Tensor) -> None:
        """Gather one block asynchronously, so that backward goes on meanwhile."""
        if self.num_workers == 1:
            self._started.append((block[None], None))
            return
        rows = torch.empty(self.num_workers, block.numel(), dtype=block.dtype, device=block.device)
        self._started.append((rows, _all_gather(rows.view(-1), block, async_op=True)))

    def finish(self) -> WorkerMatrix:
        """Wait for all blocks."""
        started, self._started = self._started, []
        for _, work in started:
            if work is not None:
                work.wait()
        return WorkerMatrix([rows for rows, _ in started])


def gather(tensor: Tensor) -> list[Tensor]:
    """Return every rank's tensor on every rank, moved to the CPU; shapes must agree."""
    exchange = AllGather(dist.get_world_size())
    exchange.start(tensor)
    return list(exchange.finish().blocks[0].cpu())


def gather_to_first(tensor: Tensor) -> list[Tensor] | None:
    """Return every rank's tensor on rank 0, moved to the CPU, and None elsewhere; shapes must agree.

    Tensors only: to unpickle objects that other ranks sent would let them run code here.
    """
    tensor = tensor.contiguous()
    if dist.get_rank() != 0:
        dist.gather(tensor, dst=0)
        return None
    received = [torch.empty_like(tensor) for _ in range(dist.get_world_size())]
    dist.gather(tensor, received, dst=0)
    return [part.cpu() for part in received]


# torch 2.13 renamed all_gather_into_tensor and warns of the old name, which is the only one on torch before that.
_all_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
