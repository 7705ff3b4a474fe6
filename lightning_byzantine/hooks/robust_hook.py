"""What makes one model's training robust, in a loop that is not ours."""

import warnings
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch.distributed as dist
from torch.utils.hooks import RemovableHandle

from lightning_byzantine.aggregation.aggregation import Aggregation, SingleWorker
from lightning_byzantine.aggregation.engine import AggregationEngine
from lightning_byzantine.aggregation.observers import Observers
from lightning_byzantine.aggregation.quarantine import Quarantine
from lightning_byzantine.aggregation.robust_aggregation import RobustAggregation
from lightning_byzantine.aggregation.worker_states import WorkerStates
from lightning_byzantine.aggregators import Aggregator, Report
from lightning_byzantine.attacks import Attack
from lightning_byzantine.estimators import Estimator

__all__ = ["RobustHook"]


class RobustHook(ABC):
    """The robust aggregation of one model's gradients, by :func:`~.robust_ddp` or :func:`~.robust_fsdp`.

    Args:
        num_workers: number of workers, m.
        aggregator: the rule, not shared with other models.
        num_byzantine: number of workers that may be Byzantine, f.
        estimator: what this rank sends, not shared with other models; None for raw gradients.

    Attributes:
        num_workers: as given.
        aggregator: as given.
        num_byzantine: as given.
        estimator: as given.

    """

    _engine: AggregationEngine

    def __init__(
        self, num_workers: int, aggregator: Aggregator, num_byzantine: int, estimator: Estimator | None
    ) -> None:
        self.num_workers = num_workers
        self.aggregator = aggregator
        self.num_byzantine = num_byzantine
        self.estimator = estimator
        self._quarantine = Quarantine()
        self._observers = Observers()

    @property
    def quarantined(self) -> frozenset[int]:
        """Indices of the workers whose rows are dropped in every step; see :meth:`quarantine`."""
        return self._quarantine.workers

    def observe(self, observer: Callable[[Report], None]) -> RemovableHandle:
        """Call a function with the :class:`~lightning_byzantine.aggregators.Report` of every aggregation.

        It is called on every rank alike, before the optimizer's step, and never with a single worker.

        Args:
            observer: takes the report.

        Returns:
            A handle, whose ``remove()`` ends the calls.

        """
        return self._observers.add(observer)

    def quarantine(self, workers: Iterable[int], *, proved: bool = False) -> None:
        """Drop the rows of these workers, in addition to those in quarantine, from the next step on.

        Must be called on all ranks.

        Args:
            workers: indices.
            proved: whether there is proof that all of them are faulty, so that f is reduced by one for each; see
                :class:`~lightning_byzantine.aggregation.quarantine.Quarantine`.

        Raises:
            ValueError: if the indices are wrong, or the rule does not support the remaining workers.

        """
        self._quarantine.add(workers, self.aggregator, self.num_workers, self.num_byzantine, proved=proved)

    def add_attack(self, attack: Attack, workers: Sequence[int]) -> None:
        """Simulate an attack from now on: replace what these workers send, on every rank.

        Must be called on all ranks.

        Args:
            attack: what they do. Its state is not in :meth:`state_dict`.
            workers: their indices.

        Raises:
            TypeError: if it is no attack on vectors.
            ValueError: unless the indices are one or more different workers that leave an honest one.

        """
        if not isinstance(attack, Attack) or not attack.on_vectors:
            raise TypeError(
                f"attack must be an Attack on what workers send, such as SignFlip(), got {attack!r}. One on data can"
                " poison the batches in your loop: `batch = attack.poison(batch)`."
            )
        attack.bind(self.aggregator, self.num_byzantine)
        attack.check(self.num_workers, workers)
        if len(workers) > self.num_byzantine and dist.get_rank() == 0:
            warnings.warn(
                f"This attack makes {len(workers)} workers Byzantine, more than num_byzantine={self.num_byzantine}"
                " allows for: no rule can be expected to survive.",
                stacklevel=2,
            )
        self._engine.add_attack(lambda matrix: attack.tamper(matrix, workers))

    def state_dict(self) -> dict[str, Any]:
        """Return the state of all workers' estimators, of the rule and of the quarantine; empty except on rank 0.

        Must be called on all ranks. For an exact resume, save it on rank 0 together with the states of the model and
        the optimizer, and load it on all ranks.
        """
        state = self._states().save(alone=False)
        state |= {"quarantined": sorted(self.quarantined), "quarantined_by_proof": sorted(self._quarantine.proved)}
        return state if dist.get_rank() == 0 else {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore what :meth:`state_dict` returned on rank 0; must be called on all ranks.

        Those in quarantine now stay there.

        Raises:
            ValueError: if it is another rank's, or of another number of workers, another estimator, or a rule with
                other state.

        """
        if not state:
            raise ValueError(
                "state must be what `state_dict` has returned on rank 0, got the empty one of another rank"
            )
        self._states().load(state)
        for workers, proved in ((state["quarantined_by_proof"], True), (state["quarantined"], False)):
            if workers:
                self.quarantine(workers, proved=proved)

    def _aggregation(self) -> Aggregation:
        if self.num_workers == 1 and (self.estimator is None or self.estimator.transparent):
            return SingleWorker()
        return RobustAggregation(self.aggregator, self.num_byzantine, self._quarantine, self._observers)

    @abstractmethod
    def _states(self) -> WorkerStates:
        """Return what converts the workers' states to plain tensors, and back."""
