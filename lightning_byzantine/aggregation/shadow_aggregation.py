"""Training by the plain mean, with reports of what a rule would have done."""

import torch
from torch import Tensor

from lightning_byzantine.aggregation.aggregation import Aggregated, Aggregation
from lightning_byzantine.aggregation.mantissas import BitCount
from lightning_byzantine.aggregation.observers import Observers
from lightning_byzantine.aggregators import Aggregator, Report
from lightning_byzantine.errors import ByzantineBreakdownError
from lightning_byzantine.estimators.worker_momentum import momentum
from lightning_byzantine.matrix import Names, WorkerMatrix

__all__ = ["ShadowAggregation"]


class ShadowAggregation(Aggregation):
    """Returns the mean, and applies a rule to the momentum of the gradients that workers sent, for its report only.

    Workers send raw gradients, so that their mean is that of stock DDP to the bit, and every rank keeps the momentum of
    the columns it received: all of each worker's in an all-gather, 1/m in an all-to-all. A rule that starts from its
    previous result starts from what that would have been. This state is reset when a run is resumed, and when DDP
    rebuilds its buckets after the first step.

    Args:
        aggregator: the rule.
        num_byzantine: f.
        beta: momentum factor; 0 for raw gradients.
        observers: called with the reports.

    Example:
        >>> from lightning_byzantine.aggregators import Krum
        >>> observers = Observers()
        >>> handle = observers.add(lambda report: print(report.trimmed))
        >>> shadow = ShadowAggregation(Krum(), num_byzantine=1, beta=0.9, observers=observers)
        >>> shadow.aggregate(WorkerMatrix([torch.tensor([[1.0], [1.5], [9.0], [2.5]])]))
        tensor([ True, False,  True,  True])
        Aggregated(parts=[tensor([3.5000])], unusable=None)

    """

    def __init__(self, aggregator: Aggregator, num_byzantine: int, beta: float, observers: Observers) -> None:
        self._aggregator = aggregator
        self._num_byzantine = num_byzantine
        self._beta = beta
        self._observers = observers
        self._layout: tuple[Names, ...] | None = None
        self._shapes: list[torch.Size] = []
        self._momentum: list[Tensor] = []
        self._next: list[Tensor] = []
        self._previous: list[Tensor] | None = None

    def aggregate(self, matrix: WorkerMatrix) -> Aggregated:
        """Return the mean, and call observers with the rule's report."""
        self._observers.tell(lambda: self._report(matrix))
        return self.mean(matrix)

    def _report(self, matrix: WorkerMatrix) -> Report:
        self._restart_if_new(matrix)
        # Of the gradients, not of the momentum that is computed here.
        bits = BitCount(matrix, wanted=self._observers.want_bits_of(matrix))
        sent = matrix if self._beta == 0 else matrix.with_blocks(self._moved(matrix))
        sent = bits.counted_with(sent.with_previous(self._previous))
        try:
            decision = self._aggregator.decide(sent, self._num_byzantine)
        except ByzantineBreakdownError as error:
            report = Report.of_breakdown(error.workers, matrix.num_workers)
        else:
            report = bits.added_to(decision.report(), decision.seen.workers)
            if self._aggregator.uses_previous:
                self._previous = decision.values()
        if self._beta > 0:
            self._commit(report.measurable)
        return report

    def _restart_if_new(self, matrix: WorkerMatrix) -> None:
        shapes = [block.shape for block in matrix.blocks]
        if matrix.layout == self._layout and shapes == self._shapes:
            return
        self._layout, self._shapes, self._previous = matrix.layout, shapes, None
        if self._beta > 0:
            self._momentum = [_momentum_like(block) for block in matrix.blocks]
            self._next = [torch.empty_like(block) for block in self._momentum]

    def _moved(self, matrix: WorkerMatrix) -> list[Tensor]:
        for before, after, block in zip(self._momentum, self._next, matrix.blocks, strict=True):
            momentum(before, block.to(before.dtype), self._beta, out=after)
        return self._next

    def _commit(self, measurable: Tensor) -> None:
        # Rows that are not measurable must not enter a worker's momentum.
        for row in (~measurable).nonzero().flatten().tolist():
            for before, after in zip(self._momentum, self._next, strict=True):
                after[row] = before[row]
        self._momentum, self._next = self._next, self._momentum


def _momentum_like(block: Tensor) -> Tensor:
    return torch.zeros_like(block, dtype=torch.promote_types(block.dtype, torch.float32))
