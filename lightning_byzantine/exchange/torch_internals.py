"""Private names of torch.distributed that this package needs, each with its reason."""

from datetime import timedelta

import torch
import torch.distributed as dist

# These three are in torch.distributed as well, but type checkers only find them here.
from torch._C._distributed_c10d import GradBucket, PrefixStore, Store

# The store of the process group's rendezvous, which all ranks can reach; and the timeout of groups that a device mesh
# has made, which has no argument for it.
from torch.distributed.distributed_c10d import _get_default_store, _set_pg_timeout
from torch.nn.parallel import DistributedDataParallel

# The argument of DistributedDataParallel's hook for buffers, which has no public name either.
from torch.nn.parallel.distributed import _BufferCommHookLocation

__all__ = [
    "GradBucket",
    "PrefixStore",
    "Store",
    "_BufferCommHookLocation",
    "_get_default_store",
    "_set_pg_timeout",
    "detour_of",
    "syncs_buffers",
    "timeout_of",
]


def detour_of(model: DistributedDataParallel) -> str | None:
    """Return in words what keeps gradients from a new communication hook; None if nothing does."""
    detours = {
        "another communication hook": bool(model._comm_hooks),
        "`mixed_precision`": model.mixed_precision is not None,
        "`skip_all_reduce_unused_params`": bool(getattr(model, "skip_all_reduce_unused_params", False)),
        # What torch.compile has set up for DDP in its configuration `optimize_ddp="python_reducer"`.
        "the Python reducer": bool(model._use_python_reducer),
    }
    return next((words for words, is_there in detours.items() if is_there), None)


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
