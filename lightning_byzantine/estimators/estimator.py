"""What a worker sends instead of its raw gradient."""

from abc import ABC, abstractmethod
from collections.abc import Sequence

from torch import Tensor

__all__ = ["Estimator", "keep"]


class Estimator(ABC):
    """The workers' estimates of the gradient, kept over steps, per parameter and for each worker of this process.

    One step is: :meth:`estimate` for every parameter and worker, an exchange, then either :meth:`commit` or
    :meth:`discard` for every worker, then :meth:`gradient` for every parameter. Parameters go by name, since DDP moves
    them from bucket to bucket. All tensors are flat, [n] for a parameter of n elements, and float32 where the parameter
    has half precision. Workers are counted within the process, from 0; mostly there is one.

    Attributes:
        transparent: whether the optimizer receives exactly the mean gradient when the rule is the mean, so that a
            single worker needs no estimator at all.

    """

    transparent: bool

    @property
    @abstractmethod
    def memory(self) -> float:
        """The part of what a worker sent that stays in what it sends next, in [0, 1)."""

    @abstractmethod
    def __repr__(self) -> str:
        """Show all arguments: a checkpoint is resumed from by an estimator that shows the same only."""

    @abstractmethod
    def reset(self) -> None:
        """Forget everything: the next step is the first one."""

    @abstractmethod
    def estimate(self, name: str, gradient: Tensor, out: Tensor, worker: int = 0) -> None:
        """Write what the worker sends for one parameter into ``out``, which is overwritten in the next step.

        Args:
            name: the parameter's name in the LightningModule.
            gradient: [n], the worker's gradient, in the dtype of ``out``.
            out: [n], float32 or float64.
            worker: which of this process's workers.

        """

    @abstractmethod
    def commit(self, worker: int = 0) -> None:
        """Make the estimates of this step the worker's state."""

    @abstractmethod
    def discard(self, worker: int = 0) -> None:
        """Leave the worker's state as it was before this step's estimates."""

    @abstractmethod
    def gradient(self, name: str, aggregate: Tensor, out: Tensor) -> None:
        """Write the gradient for the optimizer into ``out``, given what the rule made of all workers' estimates.

        Args:
            name: the parameter's name in the LightningModule.
            aggregate: [n], the same on every rank, overwritten in the next step.
            out: [n], in the dtype of the parameter.

        """

    @abstractmethod
    def worker_state(self, worker: int = 0) -> dict[str, Tensor]:
        """Return a worker's own state by parameter name."""

    @abstractmethod
    def shared_state(self) -> dict[str, Tensor]:
        """Return by parameter name the state that is the same on every rank."""

    @abstractmethod
    def load_state(self, workers: Sequence[dict[str, Tensor]], shared: dict[str, Tensor]) -> None:
        """Continue from copies of what :meth:`worker_state`, for each worker, and :meth:`shared_state` returned."""


def keep(values: dict[str, Tensor], state: dict[str, Tensor]) -> None:
    """Copy values to where an estimator keeps them, into the same memory at every step.

    Args:
        values: [n] by parameter name.
        state: what is kept; parameters that are not among the values stay.

    """
    for name, value in values.items():
        if name in state:
            state[name].copy_(value)
        else:
            state[name] = value.clone()
