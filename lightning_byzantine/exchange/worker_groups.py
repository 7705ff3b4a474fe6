"""The process groups of workers that are several ranks each."""

from weakref import WeakKeyDictionary

import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh

from lightning_byzantine.exchange.shards import Shards

__all__ = ["groups_of_workers"]

# Nobody can say when process groups, with their threads and connections, are not needed any more. So there is only one
# pair for each shape.
_known: WeakKeyDictionary[dist.ProcessGroup, dict[tuple[str, int], Shards]] = WeakKeyDictionary()


def groups_of_workers(kind: str, num_workers: int) -> Shards:
    """Return the groups of this rank across and within workers, which are neighbouring ranks; on all ranks.

    Args:
        kind: of device, such as "cpu".
        num_workers: m, which divides the number of ranks.

    """
    assert dist.group.WORLD is not None
    known = _known.setdefault(dist.group.WORLD, {})
    if (kind, num_workers) not in known:
        shape = (num_workers, dist.get_world_size() // num_workers)
        mesh = init_device_mesh(kind, shape, mesh_dim_names=("across", "within"))
        known[kind, num_workers] = Shards(mesh.get_group("across"), mesh.get_group("within"))
    return known[kind, num_workers]
