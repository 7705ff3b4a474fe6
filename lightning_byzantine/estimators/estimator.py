"""The base class of estimators, which define what a worker sends instead of its raw gradient."""

from abc import ABC, abstractmethod
from collections import defaultdict
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from lightning_byzantine.estimators.shared_columns import Columns, SharedColumns
from lightning_byzantine.utilities.copying import copy_into

__all__ = ["Estimator", "Scale", "Step"]


@dataclass(frozen=True)
class Step:
    """The step from the last aggregate to the next one, and what tells how far workers went along it.

    Sketches are vectors of k numbers that have nearly the inner products of what they are sketches of.

    Args:
        lengths: (||s||, ||a - s||), on all ranks together, of the step from s to a.
        sketches: [m + 2, k], of what each worker has sent, NaN if the aggregate is not made of that; of s; of a - s.

    """

    lengths: Tensor
    sketches: Tensor


@dataclass(frozen=True)
class Scale:
    """How long vectors are if most workers are honest.

    Args:
        length: the usual norm of a worker's vector.
        noise: the usual norm of what noise adds to the aggregate.
        step: from the last aggregate to this one; None where the estimator keeps none.

    """

    length: float
    noise: float
    step: Step | None = None


class Estimator(ABC):
    """Gradient estimates of this process's workers, with state per parameter and worker.

    Each step calls :meth:`estimate` for every parameter and worker, exchanges the estimates, calls :meth:`commit`, or
    :meth:`keep` where it can, for every worker whose estimates could be used, and then :meth:`gradient` for every
    parameter. Parameters are identified by name, because DDP moves them between buckets. All tensors are flat, [n] for
    a parameter of n elements, and float32 where the parameter has half precision. Workers are numbered within the
    process, from 0; usually there is one. Where every rank aggregates its share of the columns, what is said about the
    aggregate is about this share.

    A subclass implements the formula in :meth:`follow` and :meth:`gradient`; this class keeps what was sent last. What
    a subclass keeps of the aggregate belongs into :class:`~.shared_columns.SharedColumns`, for :meth:`place`.

    Attributes:
        transparent: whether the optimizer receives exactly the mean gradient when the rule is the mean, so that a
            single worker needs no estimator.

    """

    transparent: bool

    def __init__(self) -> None:
        self._estimates: defaultdict[int, dict[str, Tensor]] = defaultdict(dict)

    @property
    @abstractmethod
    def memory(self) -> float:
        """The fraction of a worker's last vector that remains in its next one, in [0, 1)."""

    @abstractmethod
    def __repr__(self) -> str:
        """Show all arguments; a checkpoint can only be resumed with an estimator of the same ``repr``."""

    @abstractmethod
    def follow(self, last: Tensor | None, gradient: Tensor, previous: Tensor | None, out: Tensor) -> None:
        """Write what any worker sends for one parameter in this step, given what it sent before, and change no state.

        Args:
            last: [n], what it sent in the last step in which the parameter took part; None if there was none.
            gradient: [n], its gradient.
            previous: [n], its gradient at the previous query point, on the same batch; None if it has none, or the
                estimator does not need it.
            out: [n], float32 or float64.

        """

    def estimate(self, name: str, gradient: Tensor, out: Tensor, worker: int = 0) -> None:
        """Write what the worker sends for one parameter into ``out``, without changing its state.

        Args:
            name: the parameter's name in the LightningModule.
            gradient: [n], the worker's gradient, in the dtype of ``out``.
            out: [n], float32 or float64.
            worker: which of this process's workers.

        """
        self.follow(self._estimates[worker].get(name), gradient, None, out)

    def place(self, columns: Columns) -> None:  # noqa: B027  (some keep nothing of the aggregate)
        """Begin a step, in which this rank has these columns of the aggregate, usually the same as before."""

    @property
    def starts(self) -> SharedColumns | None:
        """Where the step to the next aggregate starts; None without a limit."""
        return None

    def limit(self, names: Collection[str], scale: Scale | None) -> None:  # noqa: B027  (most have no limit)
        """Prepare :meth:`gradient` for this step, in which Byzantine workers may have moved the aggregate.

        Args:
            names: the parameters that take part in the step.
            scale: of the workers' vectors; None if nobody can be Byzantine, or the rule does not know it.

        """

    @abstractmethod
    def gradient(self, name: str, aggregate: Tensor, out: Tensor) -> None:
        """Write the gradient for the optimizer into ``out``, given the aggregate of all workers' estimates.

        Args:
            name: the parameter's name in the LightningModule.
            aggregate: [n], this rank's columns of it.
            out: [n], in the dtype of the parameter.

        """

    @abstractmethod
    def shared_state(self) -> dict[str, Tensor]:
        """Return the state that is the same for all workers, whole, by parameter name; must be called on all ranks."""

    @abstractmethod
    def load_shared_state(self, state: Mapping[str, Tensor]) -> None:
        """Restore a copy of what :meth:`shared_state` returned."""

    def reset(self) -> None:
        """Reset to the state before the first step."""
        self._estimates.clear()

    def commit(self, sent: Mapping[str, Tensor], worker: int = 0) -> None:
        """Make the estimates of this step the worker's state; otherwise they are discarded.

        Args:
            sent: what :meth:`estimate` wrote, by parameter name; copied.
            worker: which of this process's workers.

        """
        copy_into(self._estimates[worker], sent)

    def can_keep(self, sent: Mapping[str, Tensor], worker: int = 0) -> bool:
        """Return whether :meth:`keep` may be called instead of :meth:`commit`.

        Not if a subclass commits in another way, or if other parameters' state would stay where it is, in memory that
        may be used for the next estimates.
        """
        return type(self).commit is Estimator.commit and self._estimates[worker].keys() <= sent.keys()

    def keep(self, sent: Mapping[str, Tensor], worker: int = 0) -> None:
        """Do the same as :meth:`commit`, with the tensors themselves instead of copies."""
        self._estimates[worker] = dict(sent)

    def worker_state(self, worker: int = 0) -> dict[str, Tensor]:
        """Return copies of what a worker sent last, by parameter name."""
        return {name: value.clone() for name, value in self._estimates[worker].items()}

    def load_state(self, workers: Sequence[Mapping[str, Tensor]], shared: Mapping[str, Tensor]) -> None:
        """Restore copies of what :meth:`worker_state`, for each worker, and :meth:`shared_state` returned."""
        self.reset()
        for worker, state in enumerate(workers):
            copy_into(self._estimates[worker], state)
        self.load_shared_state(shared)

    def to(self, device: torch.device) -> None:
        """Move all state to a device, and discard an unfinished step; other ranks need not do so."""
        for state in self._estimates.values():
            state.update({name: value.to(device) for name, value in state.items()})
