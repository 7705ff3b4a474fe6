"""Which part of each parameter a rank holds."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, distribute_tensor

__all__ = ["ShardLayout"]


@dataclass(frozen=True)
class ShardLayout:
    """The parameters of a model of which each rank of a replica holds a part, and vectors like them in flat parts.

    A rank's part of a vector is [n] for each parameter, of which n may be 0.

    Args:
        parameters: all of them, by name, in the same order on all ranks: each a DTensor, or whole on every rank.
        duplicates: for parameters of which several ranks hold the same part, the process group of these. The first of
            them has this part of the vector, and the others none.

    """

    parameters: Mapping[str, nn.Parameter]
    duplicates: Mapping[str, dist.ProcessGroup]

    def local(self, tensor: Tensor) -> Tensor:
        """Return what is on this rank of a parameter, or of a gradient."""
        return tensor.to_local() if isinstance(tensor, DTensor) else tensor

    def has_part(self, name: str) -> bool:
        """Return whether this rank has a part of the vector for a parameter, and not another one with the same part."""
        return name not in self.duplicates or dist.get_rank(self.duplicates[name]) == 0

    def num_columns(self, name: str) -> int:
        """Return the size n of this rank's part."""
        return self.local(self.parameters[name]).numel() if self.has_part(name) else 0

    def start(self, name: str) -> int:
        """Return which element of a parameter is the first one of this rank's part.

        Of parts that are not neighbouring elements, the numbers are only different on each rank.
        """
        parameter = self.parameters[name]
        if not isinstance(parameter, DTensor):
            return 0
        divided = {placement.dim for placement in parameter.placements if hasattr(placement, "dim")}
        if not divided:
            return 0
        if divided != {0}:
            return (1 + dist.get_rank()) * sum(each.numel() for each in self.parameters.values())
        rows = torch.arange(parameter.shape[0], device=parameter.device)
        own = distribute_tensor(rows, parameter.device_mesh, parameter.placements, src_data_rank=None).to_local()
        return int(own[:1].sum()) * parameter.shape[1:].numel()  # 0 without any

    def spread(self, name: str, tensor: Tensor) -> None:
        """Overwrite what other ranks hold of a parameter or gradient, [..], by what the one with this part has."""
        if name in self.duplicates and tensor.numel() > 0:
            dist.broadcast(tensor, group=self.duplicates[name], group_src=0)

    @torch.no_grad()
    def copy_first(self, tensors: Iterable[Tensor], across: dist.ProcessGroup) -> None:
        """Overwrite parameters and buffers by what the first worker's rank with the same part has, as DDP does."""
        for tensor in tensors:
            local = self.local(tensor)
            if local.numel() > 0:
                copied = local.contiguous()
                dist.broadcast(copied, group=across, group_src=0)
                local.copy_(copied)

    def sharded(self, name: str, part: Tensor) -> Tensor:
        """Return a part [n] of a vector as a tensor of the parameter's shape, sharded like the parameter."""
        parameter = self.parameters[name]
        local = torch.zeros_like(self.local(parameter), dtype=part.dtype)
        if self.has_part(name):
            local = part.to(local.device).view_as(local)
        self.spread(name, local)
        if not isinstance(parameter, DTensor):
            return local
        return DTensor.from_local(
            local,
            parameter.device_mesh,
            parameter.placements,
            run_check=False,
            shape=parameter.shape,
            stride=parameter.stride(),
        )

    def part(self, name: str, tensor: Tensor) -> Tensor:
        """Return this rank's part [n] of what :meth:`sharded` returned."""
        return self.local(tensor).reshape(-1)[: self.num_columns(name)]

    def whole(self, name: str, part: Tensor) -> Tensor:
        """Return the whole vector [d] of a parameter, on every rank of the replica."""
        tensor = self.sharded(name, part)
        return (tensor.full_tensor() if isinstance(tensor, DTensor) else tensor).reshape(-1)

    def part_of_whole(self, name: str, whole: Tensor) -> Tensor:
        """Return this rank's part [n] of a whole vector [d]."""
        parameter = self.parameters[name]
        tensor = whole.view(parameter.shape)
        if isinstance(parameter, DTensor):
            tensor = distribute_tensor(tensor, parameter.device_mesh, parameter.placements, src_data_rank=None)
        return self.part(name, tensor)
