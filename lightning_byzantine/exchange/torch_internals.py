"""Private names of torch.distributed that this package needs, each with its reason."""

from datetime import timedelta

import torch
import torch.distributed as dist

# These three are in torch.distributed as well, but type checkers only find them here.
from torch._C._distributed_c10d import GradBucket, PrefixStore, Store

# The store of the process group's rendezvous, which all ranks can reach.
from torch.distributed.distributed_c10d import _get_default_store
from torch.nn.parallel import DistributedDataParallel

# The argument of DistributedDataParallel's hook for buffers, which has no public name either.
from torch.nn.parallel.distributed import _BufferCommHookLocation

__all__ = [
    "GradBucket",
    "PrefixStore",
    "Store",
    "_BufferCommHookLocation",
    "_get_default_store",
    "syncs_buffers",
    "timeout_of",
]


def syncs_buffers(model: DistributedDataParallel) -> bool:
    """Return whether buffers are synchronized before a forward; torch 2.13 renamed the attribute that says so."""
    # As for all_gather_single, a source tree should run with older versions, which GPU images have.
    name = "forward_sync_buffers" if hasattr(model, "forward_sync_buffers") else "broadcast_buffers"
    return bool(getattr(model, name))


def timeout_of(device: torch.device) -> timedelta:
    """Return the timeout of collectives of all ranks on a device; the group that has it may be the user's own."""
    assert dist.group.WORLD is not None
    timeout: timedelta = dist.group.WORLD._get_backend(device).options._timeout
    return timeout
