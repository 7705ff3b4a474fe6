"""What a worker sends instead of its raw gradient."""

from abc import ABC, abstractmethod

import torch
from torch import Tensor

from lightning_byzantine.checks import check_number

__all__ = ["Estimator", "WorkerMomentum"]


class Estimator(ABC):
    """A worker's estimate of the gradient, kept over steps and per parameter.

    One step is: :meth:`estimate` for every parameter, an exchange, then either :meth:`commit` or :meth:`discard`, then
    :meth:`gradient` for every parameter. Parameters go by name, since DDP moves them from bucket to bucket. All tensors
    are flat, [n] for a parameter of n elements, and float32 where the parameter has half precision.

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
    def estimate(self, name: str, gradient: Tensor, out: Tensor) -> None:
        """Write what the worker sends for one parameter into ``out``, which the estimator may keep.

        Args:
            name: the parameter's name in the LightningModule.
            gradient: [n], the worker's gradient, in the dtype of ``out``.
            out: [n], float32 or float64.

        """

    @abstractmethod
    def commit(self) -> None:
        """Make the estimates of this step the worker's state."""

    @abstractmethod
    def discard(self) -> None:
        """Leave the worker's state as it was before this step's estimates."""

    @abstractmethod
    def gradient(self, name: str, aggregate: Tensor) -> Tensor:
        """Return the gradient for the optimizer, given what the rule made of all workers' estimates.

        Args:
            name: the parameter's name in the LightningModule.
            aggregate: [n], the same on every rank; the estimator may keep it.

        """

    @abstractmethod
    def worker_state(self) -> dict[str, Tensor]:
        """Return this worker's own state by parameter name."""

    @abstractmethod
    def shared_state(self) -> dict[str, Tensor]:
        """Return by parameter name the state that is the same on every rank."""

    @abstractmethod
    def load_state(self, worker: dict[str, Tensor], shared: dict[str, Tensor]) -> None:
        """Continue from what :meth:`worker_state` and :meth:`shared_state` returned."""


class WorkerMomentum(Estimator):
    """Each worker sends the momentum of its gradients, in which attackers find less noise to hide.

    ::

        worker i sends          v_t = beta v_{t-1} + (1 - beta) g_t
        everyone aggregates     v^_t = Aggregate(v_t^1 .. v_t^m)
        the optimizer receives  g^_t = (v^_t - beta v^_{t-1}) / (1 - beta)

    With ``transparent=True``, v_0 = v^_0 = 0: under the rule :class:`~lightning_byzantine.aggregators.Mean`, g^_t is
    the mean gradient, so any optimizer trains as it would with stock DDP; under a robust rule,
    ``SGD(momentum=beta)`` moves by exactly the aggregated momentum. With ``transparent=False`` the optimizer receives
    v^_t itself and v_1 = g_1, as in the paper's public code: use it with an optimizer without momentum of its own.

    Costs one parameter-sized buffer a worker, and one more when transparent; float32 for half-precision parameters.

    Args:
        beta: momentum factor in [0, 1).
        transparent: whether to undo the momentum after the aggregation.

    Source: Karimireddy et al., "Learning from History for Byzantine Robust Optimization", ICML 2021; Dahan & Levy,
    ICML 2024 (arXiv 2405.14759).

    Example:
        >>> momentum, sent = WorkerMomentum(beta=0.9), torch.empty(1)
        >>> momentum.estimate("weight", torch.tensor([2.0]), out=sent)
        >>> momentum.commit()
        >>> sent, momentum.gradient("weight", aggregate=sent)
        (tensor([0.2000]), tensor([2.]))

    """

    def __init__(self, beta: float = 0.9, transparent: bool = True) -> None:
        check_number("beta", beta)
        if not 0 <= beta < 1:
            raise ValueError(f"beta must satisfy 0 <= beta < 1, got {beta}")
        self.beta = beta
        self.transparent = transparent
        self.reset()

    def __repr__(self) -> str:
        """Show the arguments."""
        return f"{type(self).__name__}(beta={self.beta}, transparent={self.transparent})"

    @property
    def memory(self) -> float:
        """Return beta."""
        return self.beta

    def reset(self) -> None:
        """Forget all momentum."""
        self._momentum: dict[str, Tensor] = {}
        self._pending: dict[str, Tensor] = {}
        self._aggregate: dict[str, Tensor] = {}

    def estimate(self, name: str, gradient: Tensor, out: Tensor) -> None:
        """Write v_t into ``out``."""
        _momentum(self._momentum.get(name), gradient, self.beta, self.transparent, out)
        self._pending[name] = out

    def commit(self) -> None:
        """Make v_t the momentum."""
        self._momentum.update(self._pending)
        self._pending.clear()

    def discard(self) -> None:
        """Keep v_{t-1}."""
        self._pending.clear()

    def gradient(self, name: str, aggregate: Tensor) -> Tensor:
        """Return g^_t, or v^_t when not transparent."""
        if not self.transparent:
            return aggregate
        previous = self._aggregate.get(name)
        self._aggregate[name] = aggregate
        return _undo_momentum(previous, aggregate, self.beta)

    def worker_state(self) -> dict[str, Tensor]:
        """Return v_t."""
        return dict(self._momentum)

    def shared_state(self) -> dict[str, Tensor]:
        """Return v^_t; empty when not transparent."""
        return dict(self._aggregate)

    def load_state(self, worker: dict[str, Tensor], shared: dict[str, Tensor]) -> None:
        """Continue from v_t and v^_t."""
        self.reset()
        self._momentum.update(worker)
        self._aggregate.update(shared)


def _momentum(previous: Tensor | None, gradient: Tensor, beta: float, from_zero: bool, out: Tensor) -> None:
    # v_t = beta v_{t-1} + (1 - beta) g_t, and v_1 = (1 - beta) g_1 from zero or g_1 from the gradient
    if previous is None:
        torch.mul(gradient, 1 - beta if from_zero else 1.0, out=out)
    else:
        torch.lerp(gradient, previous, beta, out=out)


def _undo_momentum(previous: Tensor | None, aggregate: Tensor, beta: float) -> Tensor:
    # g^_t = (v^_t - beta v^_{t-1}) / (1 - beta)
    if previous is None:
        return aggregate / (1 - beta)
    return torch.sub(aggregate, previous, alpha=beta).div_(1 - beta)
