"""How a module is divided among the ranks of its replica, and whether all its gradients can be aggregated."""

from collections.abc import Iterable

import torch
import torch.distributed as dist
from lightning.fabric.utilities.exceptions import MisconfigurationException
from torch import nn
from torch.distributed.tensor import DTensor

from lightning_byzantine.aggregation.shard_layout import ShardLayout

__all__ = ["layout_of"]


def layout_of(
    module: nn.Module,
    replica: range,
    shape: tuple[int, int, int],
    tensor_parallel_group: dist.ProcessGroup,
    device: torch.device,
) -> ShardLayout:
    """Return the layout of a module to which ``fully_shard`` was applied.

    Args:
        module: the module.
        replica: the ranks of this rank's replica.
        shape: number of replicas, of data-parallel groups in each, and of ranks in each of these.
        tensor_parallel_group: of this rank.
        device: where it trains.

    Raises:
        MisconfigurationException: if the gradient of a parameter is not the mean of its replica, or would bypass the
            aggregation; names the parameter.

    """
    parameters = dict(module.named_parameters())
    duplicates = {}
    for name, parameter in parameters.items():
        if parameter.requires_grad:
            _check(name, parameter, replica, shape, device)
        if shape[2] > 1 and "tensor_parallel" not in _divided_by(parameter):
            duplicates[name] = tensor_parallel_group
    return ShardLayout(parameters, duplicates)


def _check(
    name: str, parameter: nn.Parameter, replica: range, shape: tuple[int, int, int], device: torch.device
) -> None:
    if isinstance(parameter, DTensor) and not set(parameter.device_mesh.mesh.flatten().tolist()) <= set(replica):
        raise MisconfigurationException(
            f"The parameter {name!r} is divided among ranks of several replicas, whose mean no rule could undo. Use"
            ' `fully_shard` with `mesh=self.device_mesh["data_parallel"]` in `configure_model`.'
        )
    if shape[1] > 1 and "data_parallel" not in _divided_by(parameter):
        raise MisconfigurationException(
            f"The parameter {name!r} is trained, but `fully_shard` was not applied to a module that has it, so each"
            " rank of a replica would train another one. Apply it to the root module in `configure_model`, or freeze"
            " the parameter."
        )
    if parameter.is_complex():
        raise MisconfigurationException(f"The parameter {name!r} is complex, and must be real to be divided.")
    if parameter.device.type != device.type:
        raise MisconfigurationException(
            f"The parameter {name!r} is on {parameter.device.type!r}, and must be on {device.type!r}, where gradients"
            " are exchanged. Leave out `CPUOffloadPolicy`."
        )


def _divided_by(parameter: nn.Parameter) -> Iterable[str]:
    """Return the names of the dimensions of the mesh along which a parameter is divided."""
    if not isinstance(parameter, DTensor):
        return []
    names = parameter.device_mesh.mesh_dim_names or ()
    return [name for name, how in zip(names, parameter.placements, strict=True) if not how.is_replicate()]
