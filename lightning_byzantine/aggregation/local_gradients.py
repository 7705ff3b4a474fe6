"""The gradients of the workers that one process acts as."""

import torch
from torch import Tensor, nn

from lightning_byzantine.aggregation.gradients import flattened
from lightning_byzantine.utilities.torch_internals import is_view

__all__ = ["LocalGradients"]


class LocalGradients:
    """Keeps each worker's gradients, which backward would add up in ``parameter.grad`` over an accumulation window.

    DDP's hook only receives the gradient of a window's last batch; those of the other batches are kept here.

    Args:
        parameters: the parameters, by name.
        num_workers: number of workers that this process acts as, k.

    Attributes:
        worker: the worker that the current batch belongs to, in [0, k).

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
        self._left: dict[str, Tensor] = {}
        self._left_to_all: dict[str, Tensor] = {}

    def begin(self) -> None:
        """Begin a window. What is in ``parameter.grad`` was left by an earlier one, and is a part of every worker's."""
        self.give_back()
        self.clear()
        for name, parameter in self._parameters.items():
            if parameter.grad is not None:
                self._left[name] = parameter.grad
                # A copy, because backward adds to the gradient in place.
                self._left_to_all[name] = flattened(parameter.grad.clone(), parameter)
                parameter.grad = None

    def give_back(self) -> None:
        """Put what was left by an earlier window back, before the backward that DDP synchronizes."""
        for name, gradient in self._left.items():
            self._parameters[name].grad = gradient
        self._left.clear()

    def define(self) -> None:
        """Fill missing gradients with zeros if any worker's batch used the parameter, as DDP expects."""
        for name, parameter in self._parameters.items():
            if parameter.grad is None and any(name in kept for kept in self._kept):
                parameter.grad = torch.zeros_like(parameter)

    def take(self) -> None:
        """Move the gradients in ``parameter.grad`` to the current batch's worker."""
        kept = self._kept[self.worker]
        for name, parameter in self._parameters.items():
            if parameter.grad is not None:
                # It may be a view of a DDP bucket, which the next worker's gradient overwrites.
                own = parameter.grad.clone() if is_view(parameter.grad) else parameter.grad
                gradient = flattened(own, parameter)
                kept[name] = kept[name] + gradient if name in kept else gradient
                parameter.grad = None

    def of(self, worker: int, name: str, arrived: Tensor) -> Tensor:
        """Return a worker's gradient, [n], for one parameter; zeros if it has none.

        Args:
            worker: in [0, k).
            name: of the parameter.
            arrived: [n], its gradient from DDP's hook, for the current batch's worker.

        """
        kept = self._kept[worker].get(name)
        if worker == self.worker:
            return arrived if kept is None else arrived + kept
        left = self._left_to_all.get(name)
        if kept is None or left is None:
            found = left if kept is None else kept
            return torch.zeros_like(arrived) if found is None else found
        return kept + left

    def clear(self) -> None:
        """Discard all gradients, at the end of a window."""
        for kept in (*self._kept, self._left_to_all):
            kept.clear()
