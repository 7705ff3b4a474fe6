"""A rank that tells each other one something else."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

import torch.distributed as dist
from torch import Tensor

__all__ = ["saying"]


@contextmanager
def saying(say: Callable[[Tensor, int], Tensor]) -> Iterator[None]:
    """Have this rank send others what a function returns for a tensor and its receiver, which must be as long."""
    send, exchange = dist.isend, dist.all_to_all_single

    def isend(tensor: Tensor, dst: int | None = None, group: Any = None, group_dst: int | None = None) -> Any:
        receiver = group_dst if dst is None else dst
        return send(say(tensor.clone(), receiver), group=group, group_dst=receiver)

    def all_to_all_single(received: Tensor, sent: Tensor, **options: Any) -> Any:
        said = sent.clone()
        for receiver, row in enumerate(said.view(dist.get_world_size(), -1)):
            if receiver != dist.get_rank():
                row.copy_(say(row.clone(), receiver))
        return exchange(received, said, **options)

    with (
        mock.patch("torch.distributed.isend", isend),
        mock.patch("torch.distributed.all_to_all_single", all_to_all_single),
    ):
        yield
