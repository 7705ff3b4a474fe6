"""Robust aggregation for a model in DistributedDataParallel."""

from typing import Literal

import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

from lightning_byzantine.aggregation.breakdown import Breakdown
from lightning_byzantine.aggregation.defaults import num_byzantine_or_default
from lightning_byzantine.aggregation.sparse_gradients import sparse_parameters
from lightning_byzantine.aggregators import Aggregator
from lightning_byzantine.estimators import Estimator
from lightning_byzantine.exchange.torch_internals import detour_of
from lightning_byzantine.hooks.arguments import check_arguments, own_copies, warn_of_two
from lightning_byzantine.hooks.ddp_hook import DDPHook

__all__ = ["robust_ddp"]


def robust_ddp(
    model: DistributedDataParallel,
    aggregator: Aggregator | None = None,
    num_byzantine: int | None = None,
    estimator: Estimator | Literal["auto"] | None = "auto",
    exchange: Literal["all_gather", "all_to_all"] = "all_gather",
    *,
    max_worker_grad_norm: float | None = None,
    robust_buffers: bool = True,
    on_breakdown: Literal["raise", "propagate"] = "raise",
    scaler: torch.amp.GradScaler | None = None,
) -> DDPHook:
    """Aggregate a model's gradients by a robust rule instead of their mean, from the next backward on.

    Must be called on all ranks at once, before the first step; each rank is one worker. The loop and the optimizer stay
    as they are, with gradient accumulation in ``no_sync()``, clipping after backward, and so on.

    Args:
        model: the module wrapped in DDP.
        aggregator: the rule, copied. None for ``PersistentFilter()``.
        num_byzantine: number of the m workers that may be Byzantine, f < m / 2. None for the largest such f.
        estimator: what a worker sends, copied. "auto" for ``WorkerMomentum(beta=0.9, transparent=True)``, which does
            not change the gradient under the rule ``Mean``; None for raw gradients.
        exchange: "all_gather" for every rank to aggregate for itself, without trusting others; "all_to_all" for every
            rank to aggregate its share of the columns, which trusts it with them.
        max_worker_grad_norm: clips each worker's raw gradient to this norm, before the estimator. None for no clipping.
        robust_buffers: replace buffers, such as BatchNorm statistics, by the median over ranks where DDP would
            broadcast rank 0's; not with DDP's ``broadcast_buffers=False``.
        on_breakdown: what to do when more workers send non-finite vectors than ``num_byzantine``: "raise" an error that
            names them, or "propagate" the plain mean, as stock DDP does. With ``scaler``, gradients are NaN instead,
            and it skips the step.
        scaler: the GradScaler that scales the loss, if there is one, since momentum needs gradients without its scale.

    Returns:
        The hook, for the state that belongs into checkpoints, reports, quarantine and simulated attacks.

    Raises:
        TypeError: if the model is not in DDP, or an argument is of the wrong type.
        ValueError: if f is not under m / 2, the rule does not support m and f, or a choice is unknown; if gradients
            would bypass the rule, or the model's process group is not the default one.

    Example:
        >>> import os, tempfile
        >>> store = dist.FileStore(os.path.join(tempfile.mkdtemp(), "store"))
        >>> dist.init_process_group("gloo", store=store, rank=0, world_size=1)
        >>> model = DistributedDataParallel(torch.nn.Linear(2, 1))
        >>> hook = robust_ddp(model, num_byzantine=0)
        >>> model(torch.ones(4, 2)).sum().backward()
        >>> model.module.weight.grad, sorted(hook.state_dict()["shared"])
        (tensor([[4., 4.]]), [])
        >>> dist.destroy_process_group()

    """
    _check_model(model)
    check_arguments(aggregator, estimator, exchange, max_worker_grad_norm, on_breakdown)
    if scaler is not None and not isinstance(scaler, torch.amp.GradScaler):
        raise TypeError(f"scaler must be a torch.amp.GradScaler or None, got {scaler!r}")
    num_workers = dist.get_world_size()
    num_byzantine = num_byzantine_or_default(num_byzantine, num_workers)
    rule, own = own_copies(aggregator, estimator)
    rule.check(num_workers, num_byzantine)
    hook = DDPHook(
        model,
        rule,
        num_byzantine,
        own,
        exchange,
        robust_buffers,
        max_norm=max_worker_grad_norm,
        breakdown=Breakdown(on_breakdown),
        loss_scale=lambda: float(scaler.get_scale()) if scaler is not None and scaler.is_enabled() else None,
    )
    warn_of_two("robust_ddp", num_workers)
    return hook


def _check_model(model: DistributedDataParallel) -> None:
    if not isinstance(model, DistributedDataParallel):
        raise TypeError(
            f"model must be a DistributedDataParallel, got {type(model).__name__}. Wrap it: `DistributedDataParallel"
            "(model)`."
        )
    if model.process_group is not dist.group.WORLD:
        raise ValueError(
            "model must be in the default process group, whose ranks are the workers, got one with `process_group` or"
            " `device_mesh`. Leave these out."
        )
    detour = detour_of(model)
    if detour is not None:
        raise ValueError(
            "model must leave all gradients to the one communication hook that DDP can have, got one with"
            f" {detour}. Leave that out."
        )
    for name, parameter in model.module.named_parameters():
        if parameter.requires_grad and name in model.parameters_to_ignore:
            raise ValueError(
                f"model must not ignore trainable parameters, whose gradients would bypass the rule, got {name!r} among"
                " those that DDP ignores or reduces on its own. Freeze it, or let DDP have it."
            )
        if parameter.device.type not in ("cpu", "cuda"):
            raise ValueError(f"model must be on a device of type 'cpu' or 'cuda', got {parameter.device.type!r}")
    for name in sparse_parameters(model.module):
        raise ValueError(
            f"model must have dense gradients, because momentum has values in every row, got the parameter {name!r}"
            " with a sparse one. Make its module with sparse=False."
        )
