"""Private names of torch.distributed that this package needs, each with its reason."""

# These three are in torch.distributed as well, but type checkers only find them here.
from torch._C._distributed_c10d import GradBucket, PrefixStore, Store

# The store of the process group's rendezvous, which all ranks can reach.
from torch.distributed.distributed_c10d import _get_default_store

# The argument of DistributedDataParallel's hook for buffers, which has no public name either.
from torch.nn.parallel.distributed import _BufferCommHookLocation

__all__ = ["GradBucket", "PrefixStore", "Store", "_BufferCommHookLocation", "_get_default_store"]
