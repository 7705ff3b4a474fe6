"""Robust aggregation for a model that FSDP2 divides among the ranks of each replica."""

from typing import Literal

import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor

from lightning_byzantine.aggregation.breakdown import Breakdown
from lightning_byzantine.aggregation.defaults import num_byzantine_or_default
from lightning_byzantine.aggregation.shard_layout import ShardLayout
from lightning_byzantine.aggregators import Aggregator
from lightning_byzantine.estimators import Estimator
from lightning_byzantine.exchange.worker_groups import groups_of_workers
from lightning_byzantine.hooks.arguments import check_arguments, own_copies, warn_of_two
from lightning_byzantine.hooks.fsdp_hook import FSDPHook

__all__ = ["robust_fsdp"]


def robust_fsdp(
    module: nn.Module,
    mesh: DeviceMesh,
    aggregator: Aggregator | None = None,
    num_byzantine: int | None = None,
    estimator: Estimator | Literal["auto"] | None = "auto",
    exchange: Literal["all_gather", "all_to_all"] = "all_gather",
    *,
    max_worker_grad_norm: float | None = None,
    on_breakdown: Literal["raise", "propagate"] = "raise",
) -> FSDPHook:
    """Aggregate the gradients of several replicas by a robust rule, each of which FSDP2 divides among its ranks.

    Must be called on all ranks at once, before the first step. Each replica is one worker, and starts from the first
    one's parameters and buffers. In each step, after the last backward, call ``hook.aggregate()``.

    Args:
        module: the module, to which ``fully_shard`` was applied with ``mesh=mesh["shard"]``, say, the second dimension.
        mesh: of all ranks, [m, s]: m replicas of s neighbouring ranks.
        aggregator: the rule, copied. None for ``PersistentFilter()``.
        num_byzantine: number of the m replicas that may be Byzantine, f < m / 2. None for the largest such f.
        estimator: what a replica sends, copied. "auto" for ``WorkerMomentum(beta=0.9, transparent=True)``, which does
            not change the gradient under the rule ``Mean``; None for raw gradients.
        exchange: "all_gather" for every rank to see its part of all replicas' vectors; "all_to_all" for every rank to
            aggregate its share of its part, which trusts it with them, at the memory of about one part.
        max_worker_grad_norm: clips each replica's raw gradient to this norm, before the estimator. None for no
            clipping.
        on_breakdown: what to do when more replicas have non-finite gradients than ``num_byzantine``: "raise" an error
            that names them, or "propagate" the plain mean.

    Returns:
        The hook, for aggregation, the state that belongs into checkpoints, reports, quarantine and simulated attacks.

    Raises:
        TypeError: if ``fully_shard`` was not applied to the module, or an argument is of the wrong type.
        ValueError: if the mesh is not one of all ranks in replicas; if the gradient of a parameter is not that of its
            replica; if f is not under m / 2, the rule does not support m and f, or a choice is unknown.

    Example:
        >>> import os, tempfile
        >>> import torch
        >>> from torch.distributed.device_mesh import init_device_mesh
        >>> from torch.distributed.fsdp import fully_shard
        >>> store = dist.FileStore(os.path.join(tempfile.mkdtemp(), "store"))
        >>> dist.init_process_group("gloo", store=store, rank=0, world_size=1)
        >>> mesh = init_device_mesh("cpu", (1, 1), mesh_dim_names=("replicate", "shard"))
        >>> model = fully_shard(nn.Linear(2, 1), mesh=mesh["shard"])
        >>> hook = robust_fsdp(model, mesh, num_byzantine=0)
        >>> model(torch.ones(4, 2)).sum().backward()
        >>> hook.aggregate()
        >>> model.weight.grad.full_tensor()
        tensor([[4., 4.]])
        >>> dist.destroy_process_group()

    """
    if not isinstance(module, FSDPModule):
        raise TypeError(
            f"module must be one that FSDP2 divides, got {type(module).__name__}. Apply `fully_shard(module,"
            ' mesh=mesh["shard"])`.'
        )
    _check_mesh(mesh)
    check_arguments(aggregator, estimator, exchange, max_worker_grad_norm, on_breakdown)
    parameters = dict(module.named_parameters())
    for name, parameter in parameters.items():
        if parameter.requires_grad:
            _check_parameter(name, parameter, mesh)
    num_workers = mesh.size(0)
    num_byzantine = num_byzantine_or_default(num_byzantine, num_workers)
    rule, own = own_copies(aggregator, estimator)
    rule.check(num_workers, num_byzantine)
    if rule.uses_previous:
        raise ValueError(
            "aggregator must not start from the previous aggregate, of which checkpoints would hold one part, got"
            f" {rule!r}. Use another rule, such as PersistentFilter()."
        )
    layout = ShardLayout(parameters, {})
    shards = groups_of_workers(mesh.device_type, num_workers)
    layout.copy_first((*module.parameters(), *module.buffers()), shards.across)
    warn_of_two("robust_fsdp", num_workers)
    return FSDPHook(
        layout,
        shards,
        layout.local(next(iter(parameters.values()))).device,
        rule,
        num_byzantine,
        own,
        exchange,
        max_norm=max_worker_grad_norm,
        breakdown=Breakdown(on_breakdown),
    )


def _check_mesh(mesh: DeviceMesh) -> None:
    if not isinstance(mesh, DeviceMesh):
        raise TypeError(f"mesh must be a DeviceMesh, got {mesh!r}")
    if mesh.ndim != 2 or mesh.mesh.flatten().tolist() != list(range(dist.get_world_size())):
        raise ValueError(
            "mesh must be of all ranks in order, with two dimensions, replicas and the ranks of each, got"
            f" {mesh.mesh.tolist()} of {dist.get_world_size()} ranks. Make it with `init_device_mesh(device, (m, s),"
            ' mesh_dim_names=("replicate", "shard"))`; tensor parallelism needs the Trainer with `byzantine_fsdp`.'
        )


def _check_parameter(name: str, parameter: nn.Parameter, mesh: DeviceMesh) -> None:
    replica = set(mesh.mesh[mesh.get_local_rank(0)].tolist())
    ranks = set(parameter.device_mesh.mesh.flatten().tolist()) if isinstance(parameter, DTensor) else set()
    if ranks != replica:
        raise ValueError(
            f"module must be divided among the ranks of one replica, here {sorted(replica)}, got the parameter {name!r}"
            f' on {sorted(ranks) or "each rank alone"}. Apply `fully_shard` to the module with `mesh=mesh["shard"]`.'
        )
    if parameter.is_complex():
        raise ValueError(f"module must have real parameters to be divided, got the complex one {name!r}")
    if parameter.device.type != mesh.device_type:
        raise ValueError(
            f"module must be on {mesh.device_type!r}, where gradients are exchanged, got the parameter {name!r} on"
            f" {parameter.device.type!r}. Leave out `CPUOffloadPolicy`."
        )
