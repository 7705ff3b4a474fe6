"""Aggregation by a robust rule."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from lightning_byzantine.aggregation.aggregation import Aggregated, Aggregation
from lightning_byzantine.aggregation.observers import Observers
from lightning_byzantine.aggregation.quarantine import Quarantine
from lightning_byzantine.aggregators import Aggregator, Report
from lightning_byzantine.aggregators.decision import Decision
from lightning_byzantine.errors import ByzantineBreakdownError
from lightning_byzantine.estimators.estimator import Scale, Step
from lightning_byzantine.exchange.fingerprint import fingerprints
from lightning_byzantine.matrix import WorkerMatrix
from lightning_byzantine.utilities.few_digits import in_few_digits, rounded

__all__ = ["RobustAggregation"]


class RobustAggregation(Aggregation):
    """Applies a rule to the rows of all workers that are not in quarantine; :meth:`announce` then tells observers.

    Args:
        aggregator: the rule.
        num_byzantine: f; reduced by the quarantine.
        quarantine: workers whose rows are always dropped.
        observers: called with the reports.

    Example:
        >>> import torch
        >>> from lightning_byzantine.aggregators import CoordinateWiseMedian
        >>> quarantine = Quarantine()
        >>> quarantine.add([2], CoordinateWiseMedian(), num_workers=4, num_byzantine=1)
        >>> robust = RobustAggregation(CoordinateWiseMedian(), 1, quarantine, Observers())
        >>> robust.aggregate(WorkerMatrix([torch.tensor([[1.0], [2.0], [50.0], [6.0]])])).parts
        [tensor([2.])]

    """

    takes_estimates = True

    def __init__(
        self, aggregator: Aggregator, num_byzantine: int, quarantine: Quarantine, observers: Observers
    ) -> None:
        self.last_aggregate = aggregator.last_aggregate if aggregator.uses_previous else None
        self._aggregator = aggregator
        self._num_byzantine = num_byzantine
        self._quarantine = quarantine
        self._observers = observers
        self._report: Callable[[], Report] | None = None
        self._found: dict[str, Any] = {}

    def aggregate(
        self, matrix: WorkerMatrix, unused: Sequence[Tensor] | None = None, since: Sequence[Tensor] | None = None
    ) -> Aggregated:
        """Return the rule's result.

        Raises:
            ByzantineBreakdownError: if more rows are non-finite, or overflow, than may be Byzantine.

        """
        num_byzantine = self._quarantine.remaining_byzantine(matrix.num_workers, self._num_byzantine)
        try:
            decision = self._aggregator.decide(self._quarantine.without(matrix), num_byzantine)
        except ByzantineBreakdownError as error:
            report = Report.of_breakdown(error.workers, matrix.num_workers)
            self._report, self._found = lambda: report, {"unusable": error.workers}
            raise
        self._report = lambda: self._report_of(decision, matrix.num_workers)
        # The rule has not looked at the workers in quarantine.
        unusable = None if self._quarantine.workers else frozenset(decision.dropped)
        values, scale = decision.values(), decision.scale() if self._num_byzantine > 0 else None
        if scale is not None:
            # In few digits: what workers train would else depend on how DDP cuts its buckets.
            step = None if since is None else _step(decision.seen, values, since, matrix.num_workers)
            scale = Scale(in_few_digits(scale.length), in_few_digits(scale.noise), step)
        self._found = {"decision": decision, "scale": scale}
        return Aggregated(values, unusable, scale)

    def announce(self) -> None:
        """Call observers with the report on the last aggregate."""
        report, self._report, self._found = self._report, None, {}
        if report is not None:
            self._observers.tell(report, self._quarantine.workers)

    def fingerprint(self) -> bytes:
        """Return a digest of what reports follow from, of the scale and of what the rule will remember."""
        found = {name: _plain(what) for name, what in self._found.items()}
        # The last aggregate is not changed yet.
        rule = {name: state for name, state in self.memory().items() if "last_aggregate" not in name}
        return b"".join(fingerprints({"found": found, "rule": rule}))

    def memory(self) -> dict[str, Any]:
        """Return the state of the rule."""
        return self._aggregator.state_dict()

    def restore(self, memory: dict[str, Any]) -> None:
        """Restore the state of the rule."""
        self._aggregator.load_state_dict(memory)

    def mean(self, matrix: WorkerMatrix) -> Aggregated:
        """Return the mean of the rows that are not in quarantine."""
        return super().mean(self._quarantine.without(matrix))

    def _report_of(self, decision: Decision, num_workers: int) -> Report:
        report = decision.report()
        if self._quarantine.workers:
            report = report.among(decision.offered.workers, num_workers, measurable=True)
        return report


def _step(seen: WorkerMatrix, values: Sequence[Tensor], since: Sequence[Tensor], num_workers: int) -> Step:
    """Return the step between two aggregates, with NaN for the workers that are not among the rows."""
    sketches, lengths = seen.sketches(values, since)
    if seen.num_workers < num_workers:
        known, sketches = sketches, sketches.new_full((num_workers + 2, sketches.shape[1]), torch.nan)
        sketches[[*seen.workers.tolist(), -2, -1]] = known
    # Summed in float64, they are known to more digits, and have to be exact: they say how much of the step is taken.
    return Step(rounded(lengths, digits=24), sketches)


def _plain(found: Any) -> Any:
    """Return what was found as nested lists of tensors and numbers."""
    if isinstance(found, Decision):
        return found.facts()
    if isinstance(found, Scale):
        # Where the step starts is this rank's own state, of which others say nothing by what they send.
        return [found.length, found.noise, found.step and found.step.sketches[:-2]]
    return found
