"""Private names of torch.distributed that this package needs, each with its reason."""

# torch.distributed has these three as well, but only here do type checkers find them.
from torch._C._distributed_c10d import GradBucket, PrefixStore, Store

# The store in which the process group's ranks found each other: the one place that all of them can reach.
from torch.distributed.distributed_c10d import _get_default_store

# The argument of DistributedDataParallel's hook for buffers, which has no public name either.
from torch.nn.parallel.distributed import _BufferCommHookLocation

__all__ = ["GradBucket", "PrefixStore", "Store", "_BufferCommHookLocation", "_get_default_store"]
