"""Lightning's strategy for models divided among ranks, in several replicas of such ranks."""

from typing import Any, Literal
from weakref import WeakKeyDictionary

import torch.distributed as dist
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.strategies import ModelParallelStrategy
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from typing_extensions import override

from lightning_byzantine.exchange import Shards
from lightning_byzantine.exchange.torch_internals import _set_pg_timeout
from lightning_byzantine.exchange.worker_groups import groups_of_workers
from lightning_byzantine.utilities.checks import check_integer_at_least

__all__ = ["ReplicatedModelParallel"]

_NAMES = ("replicate", "data_parallel", "tensor_parallel")

# A model keeps its mesh after `fit`, so nobody can say when its process groups, with their threads and connections, are
# not needed any more. So there is only one mesh for each shape.
_known_meshes: WeakKeyDictionary[dist.ProcessGroup, dict[Any, DeviceMesh]] = WeakKeyDictionary()


class ReplicatedModelParallel(ModelParallelStrategy):
    """Several replicas of what ModelParallelStrategy trains, whose gradients are left to subclasses.

    The module sees the device mesh of its own replica, with the dimensions "data_parallel" and "tensor_parallel". A
    replica is made of neighbouring ranks.

    Args:
        replicate_size: number of replicas. "auto" for what the other sizes leave, or the number of nodes.
        data_parallel_size: number of data-parallel groups in a replica. "auto" for what the other sizes leave.
        tensor_parallel_size: number of ranks in each of these.
        **kwargs: other arguments of ModelParallelStrategy.

    Raises:
        TypeError: if a size is not a number.
        ValueError: if a size is under 1; and when the Trainer is created, if their product is not the number of
            processes.
        MisconfigurationException: then, if the number of replicas is not known.

    """

    def __init__(
        self,
        replicate_size: Literal["auto"] | int = "auto",
        data_parallel_size: Literal["auto"] | int = "auto",
        tensor_parallel_size: int = 1,
        **kwargs: Any,
    ) -> None:
        sizes = {"replicate_size": replicate_size, "data_parallel_size": data_parallel_size}
        for name, size in sizes.items():
            if size != "auto":
                check_integer_at_least(name, size, 1)
        check_integer_at_least("tensor_parallel_size", tensor_parallel_size, 1)
        super().__init__(data_parallel_size, tensor_parallel_size, **kwargs)
        self._replicate_size = replicate_size
        self._shards: Shards | None = None

    @property
    def shape(self) -> tuple[int, int, int]:
        """Number of replicas, of data-parallel groups in each, and of ranks in each of these."""
        tensor = self._tensor_parallel_size
        assert tensor != "auto"  # see the constructor
        rest = self.world_size // tensor
        if self._replicate_size != "auto":
            replicas = self._replicate_size
        elif self._data_parallel_size != "auto":
            replicas = max(1, rest // self._data_parallel_size)
        else:
            replicas = self.num_nodes
        data = max(1, rest // replicas) if self._data_parallel_size == "auto" else self._data_parallel_size
        return replicas, data, tensor

    @property
    def num_replicas(self) -> int:
        """Number of replicas."""
        return self.shape[0]

    @property
    def replica(self) -> range:
        """The ranks of this rank's replica."""
        size = self.world_size // self.num_replicas
        first = self.global_rank // size * size
        return range(first, first + size)

    @property
    def shards(self) -> Shards:
        """How the model is divided, once processes have met."""
        assert self._shards is not None
        return self._shards

    @property
    def tensor_parallel_group(self) -> dist.ProcessGroup:
        """The ranks that hold the same part of what is divided among data-parallel groups only."""
        return self.device_mesh.get_group("tensor_parallel")

    @property
    @override
    def distributed_sampler_kwargs(self) -> dict[str, Any]:
        replicas, data, tensor = self.shape
        return {"num_replicas": replicas * data, "rank": self.global_rank // tensor}

    @override
    def set_world_ranks(self) -> None:
        super().set_world_ranks()
        if self._replicate_size == self._data_parallel_size == "auto" and self.num_nodes == 1:
            raise MisconfigurationException(
                f"{type(self).__name__} takes each node for one replica by default, and one replica can't outvote"
                " itself, got 1 node. Say how many replicas there are: replicate_size=4."
            )
        replicas, data, tensor = self.shape
        if replicas * data * tensor != self.world_size:
            raise ValueError(
                "replicate_size * data_parallel_size * tensor_parallel_size must be the number of processes, got"
                f" {replicas} * {data} * {tensor} with {self.world_size} processes"
            )

    @override
    def setup_environment(self) -> None:
        # As the overridden method does, with another mesh.
        self._setup_distributed()
        mesh = _mesh(self.root_device.type, self.shape)
        self._shards = groups_of_workers(self.root_device.type, self.num_replicas)
        for group in (*mesh.get_all_groups(), self._shards.across, self._shards.within):
            if self._timeout is not None:
                _set_pg_timeout(self._timeout, group)
        self._device_mesh = mesh[_NAMES[1:]]
        assert self.lightning_module is not None
        self.lightning_module._device_mesh = self._device_mesh


def _mesh(kind: str, shape: tuple[int, int, int]) -> DeviceMesh:
    """Return the mesh of all ranks."""
    assert dist.group.WORLD is not None
    known = _known_meshes.setdefault(dist.group.WORLD, {})
    if (kind, shape) not in known:
        known[kind, shape] = init_device_mesh(kind, shape, mesh_dim_names=_NAMES)
    return known[kind, shape]
