"""What every estimator has in common: what a worker sends instead of its raw gradient."""

from abc import ABC, abstractmethod
from collections import defaultdict
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from lightning_byzantine.utilities.copying import copy_into

__all__ = ["Estimator"]


class Estimator(ABC):
    """The workers' estimates of the gradient, kept over steps, per parameter and for each worker of this process.

    One step is: :meth:`estimate` for every parameter and worker, an exchange, :meth:`commit` for every worker whose
    estimates could be used, then :meth:`gradient` for every parameter. Parameters go by name, since DDP moves them from
    bucket to bucket. All tensors are flat, [n] for a parameter of n elements, and float32 where the parameter has half
    precision. Workers are counted within the process, from 0; mostly there is one.

    A subclass writes the formula, in :meth:`estimate` and :meth:`gradient`; what the workers sent last is kept here.

    Attributes:
        transparent: whether the optimizer receives exactly the mean gradient when the rule is the mean, so that a
            single worker needs no estimator at all.

    """

    transparent: bool

    def __init__(self) -> None:
        self._estimates: defaultdict[int, dict[str, Tensor]] = defaultdict(dict)

    @property
    @abstractmethod
    def memory(self) -> float:
        """The part of what a worker sent that stays in what it sends next, in [0, 1)."""

    @abstractmethod
    def __repr__(self) -> str:
        """Show all arguments: a checkpoint is resumed from by an estimator that shows the same only."""

    @abstractmethod
    def estimate(self, name: str, gradient: Tensor, out: Tensor, worker: int = 0) -> None:
        """Write what the worker sends for one parameter into ``out``; its state stays as it is.

        Args:
            name: the parameter's name in the LightningModule.
            gradient: [n], the worker's gradient, in the dtype of ``out``.
            out: [n], float32 or float64.
            worker: which of this process's workers.

        """

    @abstractmethod
    def gradient(self, name: str, aggregate: Tensor, out: Tensor) -> None:
        """Write the gradient for the optimizer into ``out``, given what the rule made of all workers' estimates.

        Args:
            name: the parameter's name in the LightningModule.
            aggregate: [n], the same on every rank.
            out: [n], in the dtype of the parameter.

        """

    @abstractmethod
    def shared_state(self) -> dict[str, Tensor]:
        """Return by parameter name the state that is the same on every rank."""

    @abstractmethod
    def load_shared_state(self, state: Mapping[str, Tensor]) -> None:
        """Continue from a copy of what :meth:`shared_state` returned."""

    def reset(self) -> None:
        """Forget everything: the next step is the first one."""
        self._estimates.clear()

    def commit(self, sent: Mapping[str, Tensor], worker: int = 0) -> None:
        """Make the estimates of this step the worker's state; without it, they leave no trace.

        Args:
            sent: what :meth:`estimate` wrote, by parameter name; copied.
            worker: which of this process's workers.

        """
        copy_into(self._estimates[worker], sent)

    def worker_state(self, worker: int = 0) -> dict[str, Tensor]:
        """Return a worker's own state by parameter name: what it sent last."""
        return dict(self._estimates[worker])

    def load_state(self, workers: Sequence[Mapping[str, Tensor]], shared: Mapping[str, Tensor]) -> None:
        """Continue from copies of what :meth:`worker_state`, for each worker, and :meth:`shared_state` returned."""
        self.reset()
        for worker, state in enumerate(workers):
            copy_into(self._estimates[worker], state)
        self.load_shared_state(shared)

    def to(self, device: torch.device) -> None:
        """Move all state to a device, and forget what belongs to a step that was not finished."""
        workers = [self.worker_state(worker) for worker in range(1 + max(self._estimates, default=-1))]
        shared = {name: value.to(device) for name, value in self.shared_state().items()}
        self.load_state([{name: value.to(device) for name, value in state.items()} for state in workers], shared)
