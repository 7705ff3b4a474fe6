"""What all strategies of Lightning's Trainer have in common that aggregate by a robust rule."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable
from typing import Any, Literal

import torch
from lightning.pytorch import Trainer
from lightning.pytorch.utilities import rank_zero_warn
from torch.utils.hooks import RemovableHandle
from typing_extensions import override

from lightning_byzantine.aggregation.breakdown import Breakdown
from lightning_byzantine.aggregation.defaults import (
    aggregator_or_default,
    estimator_or_default,
    num_byzantine_or_default,
)
from lightning_byzantine.aggregation.engine import AggregationEngine
from lightning_byzantine.aggregation.quarantine import Quarantine
from lightning_byzantine.aggregators import Aggregator, Report
from lightning_byzantine.estimators import Estimator
from lightning_byzantine.exchange import EXCHANGES
from lightning_byzantine.strategies.audits.verdict import Verdict
from lightning_byzantine.strategies.fault_tolerant import FaultTolerant
from lightning_byzantine.utilities.checks import check_choice, check_positive

__all__ = ["RobustStrategy"]


class RobustStrategy(FaultTolerant, ABC):
    """Mixed into one of Lightning's strategies: the rule with its arguments, reports and quarantine.

    Args:
        aggregator: the rule. None for ``PersistentFilter()``.
        num_byzantine: number of the m workers that may be Byzantine, f < m / 2. None for the largest such f.
        estimator: what a worker sends. "auto" for ``WorkerMomentum()``; None for raw gradients.
        max_worker_grad_norm: clips each worker's raw gradient to this norm, before the estimator. None for no clipping.
        exchange: "all_gather" or "all_to_all".
        on_breakdown: what to do when more workers send non-finite vectors than ``num_byzantine``.
        max_skips: maximum number of consecutive skipped steps; one more raises the error.
        restart_estimator: ignore the estimator's and the rule's state when resuming from a checkpoint.
        **kwargs: arguments of the strategy.

    Attributes:
        engine: aggregates the gradients, during ``fit``.
        shadow: whether the plain mean trains, and the rule only reports.

    Raises:
        TypeError: if the aggregator is not an Aggregator, or the estimator not an Estimator.
        ValueError: if a choice is unknown, or a number out of range; and when the Trainer is created, if f is not under
            m / 2, or the aggregator does not support m and f.

    """

    engine: AggregationEngine | None
    shadow = False

    def __init__(
        self,
        *,
        aggregator: Aggregator | None,
        num_byzantine: int | None,
        estimator: Estimator | Literal["auto"] | None,
        max_worker_grad_norm: float | None,
        exchange: Literal["all_gather", "all_to_all"],
        on_breakdown: Literal["raise", "skip", "propagate"],
        max_skips: int,
        restart_estimator: bool,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        self.aggregator = aggregator_or_default(aggregator)
        self.estimator = estimator_or_default(estimator)
        if max_worker_grad_norm is not None:
            check_positive("max_worker_grad_norm", max_worker_grad_norm)
        self.exchange = check_choice("exchange", exchange, EXCHANGES)
        self.restart_estimator = restart_estimator
        self._num_byzantine = num_byzantine
        self._max_worker_grad_norm = max_worker_grad_norm
        self._breakdown = Breakdown(on_breakdown, max_skips)
        self._quarantine = Quarantine()

    @property
    @override
    def num_byzantine(self) -> int:
        """Number of workers that may be Byzantine, f."""
        return num_byzantine_or_default(self._num_byzantine, self.num_workers)

    @property
    def quarantined(self) -> frozenset[int]:
        """Indices of the workers whose rows are dropped in every step; see :meth:`quarantine`."""
        return self._quarantine.workers

    @property
    def quarantined_by_proof(self) -> frozenset[int]:
        """Indices of those of them for which there is proof that they are faulty."""
        return self._quarantine.proved

    @property
    def skipped_steps(self) -> int:
        """Number of steps skipped in the whole run, by ``on_breakdown="skip"``."""
        return self._breakdown.skipped

    def observe(self, observer: Callable[[Report], None]) -> RemovableHandle:
        """Call a function with the :class:`~lightning_byzantine.aggregators.Report` of every aggregation.

        It is called on every rank, before the optimizer's step.

        Args:
            observer: takes the report.

        Returns:
            A handle, whose ``remove()`` ends the calls.

        """
        return self._observers.add(observer)

    def quarantine(self, workers: Iterable[int], *, proved: bool = False) -> None:
        """Drop the rows of these workers, in addition to those in quarantine, from the next step on.

        Must be called on all ranks. Which workers are in quarantine, and for which there is proof, is saved in
        checkpoints. In those of earlier versions, there is proof for none.

        Args:
            workers: indices.
            proved: whether there is proof that all of them are faulty, so that f is reduced by one for each. Otherwise
                an honest worker may be among them, so that f stays as it is, or becomes the largest that is under half
                of the remaining workers; see :class:`~lightning_byzantine.aggregation.quarantine.Quarantine`.

        Raises:
            MisconfigurationException: in shadow mode.
            ValueError: if the indices are wrong, or the rule does not support the remaining workers.

        """
        self._quarantine.add(workers, self.aggregator, self.num_workers, self.num_byzantine, proved=proved)

    @abstractmethod
    def audit(self, worker: int) -> None:
        """Let all other ranks compute a worker's step once more, in one of the next steps, and compare.

        They get its batches of that step, its random state and the module's buffers. Training, logs and random numbers
        stay the same. Costs less than three steps' time, and on each rank memory for two rows and for a copy of what
        the module holds besides its trainable parameters. Must be called on all ranks, during ``fit``. Does nothing if
        an audit of this worker is to come already.

        Args:
            worker: its index.

        Raises:
            MisconfigurationException: where a step can't be computed once more, such as in manual optimization.
            ValueError: if there is no such worker.

        """

    @abstractmethod
    def check_audits(self) -> None:
        """Raise :class:`MisconfigurationException` if :meth:`audit` would, whatever the worker."""

    @abstractmethod
    def observe_verdicts(self, observer: Callable[[Verdict], None]) -> RemovableHandle:
        """Call a function with the :class:`~lightning_byzantine.strategies.audits.verdict.Verdict` of every audit.

        It is called before the optimizer's step, on every rank alike.

        Args:
            observer: takes the verdict.

        Returns:
            A handle, whose ``remove()`` ends the calls.

        """

    # Not an `override`: not all of Lightning's strategies have it in a base class.
    def set_world_ranks(self) -> None:
        """Check the rule, since the number of workers is known from here on, while the Trainer is created."""
        super().set_world_ranks()  # type: ignore[misc]
        self.aggregator.check(self.num_workers, self.num_byzantine)

    @override
    def setup_optimizers(self, trainer: Trainer) -> None:
        super().setup_optimizers(trainer)
        if self.num_workers == 2:
            rank_zero_warn(
                f"Two workers cannot outvote each other: {type(self).__name__} withstands f < m / 2 Byzantine workers,"
                " which is f=0 with 2 workers. Use 3 workers or more."
            )

    @override
    def teardown(self) -> None:
        # As Lightning does with optimizers: state for a checkpoint after fit need not stay on the device.
        if self.estimator is not None:
            self.estimator.to(torch.device("cpu"))
        super().teardown()

    def _counts(self) -> dict[str, Any]:
        """Return what belongs into checkpoints besides the states of estimators and rule."""
        return {
            "quarantined": sorted(self.quarantined),
            "quarantined_by_proof": sorted(self._quarantine.proved),
            "skipped": self._breakdown.skipped,
        }

    def _load_counts(self, state: dict[str, Any]) -> None:
        self._breakdown.skipped = state.get("skipped", 0)
        quarantined = state.get("quarantined", [])
        if quarantined and state["num_workers"] != self.num_workers:
            rank_zero_warn(
                f"The checkpoint has workers {quarantined} of {state['num_workers']} in quarantine. With"
                f" {self.num_workers} workers the indices refer to others, so the quarantine is empty now."
            )
        elif quarantined and self.shadow:
            rank_zero_warn(f"The checkpoint has workers {quarantined} in quarantine, which shadow mode ignores.")
        elif quarantined:
            by_proof = state.get("quarantined_by_proof", [])
            if by_proof:
                self.quarantine(by_proof, proved=True)
            self.quarantine(quarantined)
