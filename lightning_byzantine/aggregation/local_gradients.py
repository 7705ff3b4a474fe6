"""The gradients of the workers that one process acts as."""

import torch
from torch import Tensor, nn

from lightning_byzantine.aggregation.gradients import flattened
from lightning_byzantine.utilities.torch_internals import is_view

__all__ = ["LocalGradients"]


class LocalGradients:
    """Keeps apart by worker what backward would add up in ``parameter.grad`` over an accumulation window.

    DDP hands over the gradient of a window's last batch only, so those of the other batches wait here.

    Args:
        parameters: the parameters, by name.
        num_workers: how many workers this process acts as, k.

    Attributes:
        worker: whose batch is being worked on, in [0, k).

    Example:
        >>> weight = nn.Parameter(torch.tensor([1.0]))
        >>> gradients = LocalGradients({"weight": weight}, num_workers=2)
        >>> (3 * weight).sum().backward()
        >>> gradients.take()
        >>> gradients.of(0, "weight", arrived=torch.zeros(1)), weight.grad
        (tensor([3.]), None)

    """

    def __init__(self, parameters: dict[str, nn.Parameter], num_workers: int) -> None:
        self.num_workers = num_workers
        self.worker = 0
        self._parameters = parameters
        self._kept: list[dict[str, Tensor]] = [{} for _ in range(num_workers)]

    def take(self) -> None:
        """Move what backward has left in ``parameter.grad`` to the worker whose batch it was."""
        kept = self._kept[self.worker]
        for name, parameter in self._parameters.items():
            if parameter.grad is not None:
                # DDP may have made it a view of a bucket, which is going to hold another worker's gradient.
                own = parameter.grad.clone() if is_view(parameter.grad) else parameter.grad
                gradient = flattened(own, parameter)
                kept[name] = kept[name] + gradient if name in kept else gradient
                parameter.grad = None

    def define(self) -> None:
        """Put zeros where a parameter has no gradient but some worker's batch used it, as DDP's bookkeeping expects."""
        for name, parameter in self._parameters.items():
            if parameter.grad is None and any(name in kept for kept in self._kept):
                parameter.grad = torch.zeros_like(parameter)

    def of(self, worker: int, name: str, arrived: Tensor) -> Tensor:
        """Return a worker's gradient, [n], for one parameter; zeros if it has none.

        Args:
            worker: in [0, k).
            name: the parameter's.
            arrived: [n], what DDP has handed over for it, of the worker whose batch is being worked on.

        """
        kept = self._kept[worker].get(name)
        if worker == self.worker:
            return arrived if kept is None else arrived + kept
        return arrived.new_zeros(arrived.shape) if kept is None else kept

    def clear(self) -> None:
        """Forget all: a new window begins."""
        for kept in self._kept:
            kept.clear()
