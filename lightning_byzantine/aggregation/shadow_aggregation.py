"""Training by the plain mean, with reports of what a rule would have done."""

from collections.abc import Sequence
from itertools import chain

import torch
from torch import Tensor

from lightning_byzantine.aggregation.aggregation import Aggregated, Aggregation
from lightning_byzantine.aggregation.observers import Observers
from lightning_byzantine.aggregators import Aggregator, Report
from lightning_byzantine.errors import ByzantineBreakdownError
from lightning_byzantine.estimators.worker_momentum import momentum
from lightning_byzantine.matrix import Names, WorkerMatrix

__all__ = ["ShadowAggregation"]


class ShadowAggregation(Aggregation):
    """Returns the mean, and applies a rule to the momentum of the gradients that workers sent, for its report only.

    Workers send raw gradients, so that their mean is that of stock DDP to the bit, and every rank keeps the momentum of
    the columns it received: all of each worker's in an all-gather, 1/m in an all-to-all. Parameters that no worker has
    used in a step keep theirs. A rule that starts from its previous result starts from what that would have been. This
    state is reset when a run is resumed, and when DDP rebuilds its buckets after the first step.

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
        >>> shadow.aggregate(WorkerMatrix([torch.tensor([[1.0], [1.5], [9.0], [2.5]])])).parts
        tensor([ True, False,  True,  True])
        [tensor([3.5000])]

    """

    def __init__(self, aggregator: Aggregator, num_byzantine: int, beta: float, observers: Observers) -> None:
        self._aggregator = aggregator
        self._num_byzantine = num_byzantine
        self._beta = beta
        self._observers = observers
        self._layout: tuple[Names, ...] = ()
        self._shapes: list[torch.Size] = []
        self._momentum: list[Tensor] = []
        self._next: list[Tensor] = []
        self._previous: list[Tensor] | None = None

    def aggregate(
        self, matrix: WorkerMatrix, unused: Sequence[Tensor] | None = None, since: Sequence[Tensor] | None = None
    ) -> Aggregated:
        """Return the mean, and call observers with the rule's report."""
        self._observers.tell(lambda: self._report(matrix, unused))
        return self.mean(matrix)

    def _report(self, matrix: WorkerMatrix, unused: Sequence[Tensor] | None) -> Report:
        self._restart_if_new(matrix)
        sent = matrix if self._beta == 0 else matrix.with_blocks(self._moved(matrix, unused))
        sent = sent.with_previous(_cleared(self._previous, unused))
        try:
            decision = self._aggregator.decide(sent, self._num_byzantine)
        except ByzantineBreakdownError as error:
            report = Report.of_breakdown(error.workers, matrix.num_workers)
        else:
            report = decision.report()
            if self._aggregator.uses_previous:
                self._previous = _merged(self._previous, decision.values(), unused)
        if self._beta > 0:
            self._commit(report.measurable, unused)
        return report

    def _restart_if_new(self, matrix: WorkerMatrix) -> None:
        layout, shapes = matrix.layout or (), [block.shape for block in matrix.blocks]
        if shapes == self._shapes and _agree(layout, self._layout):
            self._layout = _united(layout, self._layout)
            return
        self._layout, self._shapes, self._previous = layout, shapes, None
        if self._beta > 0:
            self._momentum = [_momentum_like(block) for block in matrix.blocks]
            self._next = [torch.empty_like(block) for block in self._momentum]

    def _moved(self, matrix: WorkerMatrix, unused: Sequence[Tensor] | None) -> list[Tensor]:
        for before, after, block in zip(self._momentum, self._next, matrix.blocks, strict=True):
            momentum(before, block.to(before.dtype), self._beta, out=after)
        for after, columns in zip(self._next, unused or (), strict=unused is not None):
            after.masked_fill_(columns, 0)
        return self._next

    def _commit(self, measurable: Tensor, unused: Sequence[Tensor] | None) -> None:
        # Rows that are not measurable must not enter a worker's momentum.
        for row in (~measurable).nonzero().flatten().tolist():
            for before, after in zip(self._momentum, self._next, strict=True):
                after[row] = before[row]
        self._next = _merged(self._momentum, self._next, unused)
        self._momentum, self._next = self._next, self._momentum


def _momentum_like(block: Tensor) -> Tensor:
    return torch.zeros_like(block, dtype=torch.promote_types(block.dtype, torch.float32))


def _cleared(values: list[Tensor] | None, unused: Sequence[Tensor] | None) -> list[Tensor] | None:
    if values is None or unused is None:
        return values
    return [value.masked_fill(columns, 0) for value, columns in zip(values, unused, strict=True)]


def _merged(before: list[Tensor] | None, after: list[Tensor], unused: Sequence[Tensor] | None) -> list[Tensor]:
    """Return the new values, but the old ones in unused columns."""
    if before is None or unused is None:
        return after
    return [torch.where(columns, old, new) for columns, old, new in zip(unused, before, after, strict=True)]


def _agree(layout: tuple[Names, ...], other: tuple[Names, ...]) -> bool:
    """Return whether all parameters that both layouts name are in the same places."""
    if list(map(len, layout)) != list(map(len, other)):
        return False
    pairs = zip(chain.from_iterable(layout), chain.from_iterable(other), strict=True)
    return all(name == known for name, known in pairs if name is not None and known is not None)


def _united(layout: tuple[Names, ...], other: tuple[Names, ...]) -> tuple[Names, ...]:
    pairs = (zip(*names, strict=True) for names in zip(layout, other, strict=True))
    return tuple(tuple(known if name is None else name for name, known in block) for block in pairs)
