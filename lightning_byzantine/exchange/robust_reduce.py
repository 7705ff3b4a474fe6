"""Reduction of logged values over ranks whose result a minority can't control."""

from collections.abc import Callable

import torch.distributed as dist
from torch import Tensor

from lightning_byzantine.exchange.votes import median, order_statistic, outvoted

__all__ = ["robust_reduce"]


def robust_reduce(
    tensor: Tensor,
    reduce_op: str,
    num_byzantine: int,
    gather: Callable[[Tensor], Tensor],
    notice: Callable[[Tensor], None],
) -> Tensor:
    """Reduce a tensor over all ranks, in place as Lightning does. NaN counts as the largest value.

    ::

        mean, avg   median
        sum         m median
        max         the (f + 1)-th largest
        min         the (f + 1)-th smallest

    Up to the factor m, each lies between the reports of two ranks that are not among the f faulty ones. Where faulty
    ranks have lost their vote, m and f are less by their number.

    Args:
        tensor: [..], this rank's value.
        reduce_op: one of the above.
        num_byzantine: f.
        gather: returns the flat tensors of all voters as [v, n].
        notice: called with the voters whose value is not finite where the majority is, [v] bool.

    Raises:
        ValueError: if the reduction is not one of these.

    """
    if reduce_op not in ("mean", "avg", "sum", "max", "min"):
        raise ValueError(f"reduce_op must be mean, avg, sum, max or min under robust_metrics=True, got {reduce_op!r}")
    # In float64 for integers as well: the median of counts, such as numbers of samples, can be a fraction.
    reports = gather(tensor.detach().flatten().double())
    notice(outvoted(reports))
    num_byzantine = max(0, num_byzantine - (dist.get_world_size() - len(reports)))
    if reduce_op == "max":
        value = order_statistic(reports, -1 - num_byzantine)
    elif reduce_op == "min":
        value = order_statistic(reports, num_byzantine)
    else:
        value = median(reports) * (len(reports) if reduce_op == "sum" else 1)
    return tensor.copy_(value.view(tensor.shape))
