"""Collectives on plain tensors only: unpickling objects from other ranks would let them run code here."""

from collections.abc import Callable, Sequence

import torch
import torch.distributed as dist
from torch import Tensor

__all__ = [
    "gather",
    "gather_rows",
    "gather_to_first",
    "is_direct",
    "is_failed_collective",
    "start_gather",
    "start_gather_of_parts",
    "start_transfers",
]


def start_gather(received: Tensor, own: Tensor, group: dist.ProcessGroup | None = None) -> list[Callable[[], object]]:
    """Start gathering every rank's flat tensor into ``received``, in the order of ranks; return what to wait for.

    This rank's may already be there.
    """
    if own.numel() == 0:
        return []
    if not is_direct(own.device):
        return [_all_gather(received, own, group=group, async_op=True).wait]
    rank, parts = dist.get_rank(group), received.chunk(dist.get_world_size(group))
    waits = _start_sends(parts, own, group)
    if own.data_ptr() != parts[rank].data_ptr():
        parts[rank].copy_(own)
    return waits


def start_gather_of_parts(
    whole: Tensor, width: int, group: dist.ProcessGroup | None = None
) -> list[Callable[[], object]]:
    """Start filling in what other ranks have of a flat tensor; return what to wait for.

    Args:
        whole: [c], the same c on all ranks, contiguous. Rank r has the columns from r ``width`` to (r + 1) ``width``.
        width: such that all ranks together have all columns.
        group: of the ranks.

    """
    rank, num_ranks = dist.get_rank(group), dist.get_world_size(group)
    if is_direct(whole.device):
        parts = [whole[part * width : (part + 1) * width] for part in range(num_ranks)]
        return _start_sends(parts, parts[rank], group)
    own, padded = whole.new_zeros(width), whole.new_empty(num_ranks * width)
    part = whole[rank * width : (rank + 1) * width]
    own[: part.numel()] = part
    return [*start_gather(padded, own, group), lambda: whole.copy_(padded[: whole.numel()])]


def _start_sends(parts: Sequence[Tensor], own: Tensor, group: dist.ProcessGroup | None) -> list[Callable[[], object]]:
    """Send this rank's part to all others, and receive theirs."""
    # gloo's own all-gather uses twice the memory, at a third of the speed. Its sends support CPU tensors only.
    rank, works = dist.get_rank(group), list[dist.Work | None]()
    for distance in range(1, len(parts)):
        sender, receiver = (rank - distance) % len(parts), (rank + distance) % len(parts)
        if parts[sender].numel():
            works.append(dist.irecv(parts[sender], group=group, group_src=sender))
        if own.numel():
            works.append(dist.isend(own, group=group, group_dst=receiver))
    return [work.wait for work in works if work is not None]


def is_direct(device: torch.device) -> bool:
    """Return whether :func:`start_gather` sends tensors on this device directly, and not by way of other ranks."""
    return dist.get_backend() == "gloo" and device.type == "cpu"


def start_transfers(
    sent: Sequence[tuple[Tensor, int]], received: Sequence[tuple[Tensor, int]]
) -> list[Callable[[], object]]:
    """Start sending contiguous tensors to ranks, and receiving others from ranks; return what to wait for."""
    if dist.get_backend() == "gloo":
        works: list[dist.Work | None] = [dist.irecv(tensor, rank) for tensor, rank in received]
        works += [dist.isend(tensor, rank) for tensor, rank in sent]
    else:
        # NCCL's would wait for each other.
        operations = [dist.P2POp(dist.irecv, tensor, rank) for tensor, rank in received]
        operations += [dist.P2POp(dist.isend, tensor, rank) for tensor, rank in sent]
        works = [*dist.batch_isend_irecv(operations)] if operations else []
    return [work.wait for work in works if work is not None]


def gather(tensor: Tensor, group: dist.ProcessGroup | None = None) -> list[Tensor]:
    """Return every rank's flat tensor on every rank, moved to the CPU; lengths must agree."""
    return list(gather_rows(tensor, group).cpu())


def gather_rows(tensor: Tensor, group: dist.ProcessGroup | None = None) -> Tensor:
    """Return every rank's flat tensor [n] on every rank, as [m, n] where it was; lengths must agree."""
    rows = tensor.new_empty(dist.get_world_size(group), tensor.numel())
    _all_gather(rows.view(-1), tensor, group=group)
    return rows


def gather_to_first(tensor: Tensor, group: dist.ProcessGroup | None = None) -> list[Tensor] | None:
    """Return every rank's tensor on the first, moved to the CPU, and None elsewhere; shapes must agree."""
    tensor = tensor.contiguous()
    if dist.get_rank(group) != 0:
        dist.gather(tensor, group=group, group_dst=0)
        return None
    received = [torch.empty_like(tensor) for _ in range(dist.get_world_size(group))]
    dist.gather(tensor, received, group=group, group_dst=0)
    return [part.cpu() for part in received]


def is_failed_collective(error: BaseException) -> bool:
    """Return whether the error is one of a collective, such as of a broken connection, and not of the user's code."""
    # gloo's errors have no type of their own, but name the file of gloo's code that raised them.
    return isinstance(error, dist.DistError) or (isinstance(error, RuntimeError) and "gloo/" in str(error))


# torch 2.13 renamed all_gather_into_tensor and deprecated the old name. Older versions only have that one; they are not
# supported as installations, but GPU images lag behind, and a source tree should run there.
_all_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
