"""What a rule would have done, beside a training by the plain mean."""

import torch
from torch import Tensor

from lightning_byzantine.aggregators import Aggregator
from lightning_byzantine.aggregators.report import Report
from lightning_byzantine.errors import ByzantineBreakdownError
from lightning_byzantine.matrix import Names, WorkerMatrix

__all__ = ["Shadow"]


class Shadow:
    """Applies a rule to the momentum of the gradients that workers sent, for its report alone.

    Workers send raw gradients, so that their mean is that of stock DDP to the bit, and every rank keeps the momentum of
    the columns it received: all of each worker's in an all-gather, 1/m in an all-to-all. A rule that starts from what
    it returned last starts from what it would have returned. All this begins afresh when a run is resumed, and when DDP
    rebuilds its buckets after the first step.

    Args:
        aggregator: the rule.
        beta: momentum factor; 0 for raw gradients.

    Example:
        >>> from lightning_byzantine.aggregators import Krum
        >>> shadow = Shadow(Krum(), beta=0.9)
        >>> matrix = WorkerMatrix([torch.tensor([[1.0], [1.5], [9.0], [2.5]])])
        >>> shadow.report(matrix, num_byzantine=1).trimmed
        tensor([ True, False,  True,  True])

    """

    def __init__(self, aggregator: Aggregator, beta: float) -> None:
        self._aggregator = aggregator
        self._beta = beta
        self._layout: tuple[Names, ...] | None = None
        self._shapes: list[torch.Size] = []
        self._momentum: list[Tensor] = []
        self._next: list[Tensor] = []
        self._previous: list[Tensor] | None = None

    def report(self, matrix: WorkerMatrix, num_byzantine: int, watch_bits: bool = False) -> Report:
        """Return what the rule finds out about the workers.

        Args:
            matrix: their gradients.
            num_byzantine: f.
            watch_bits: whether to look at the gradients' bits as well: momentum has bits of its own.

        """
        self._restart_if_new(matrix)
        sent = matrix.with_blocks(matrix.blocks if self._beta == 0 else self._moved(matrix))
        sent.previous = self._previous
        if watch_bits:
            pass
        try:
            decision = self._aggregator.decide(sent, num_byzantine)
            report = decision.report()
            if self._aggregator.uses_previous:
                self._previous = decision.values()
        except ByzantineBreakdownError as error:
            report = Report.of_breakdown(error.workers, matrix.num_workers)
        if self._beta > 0:
            # What workers could not measure never enters their momentum.
            for row in (~report.measurable).nonzero().flatten().tolist():
                for before, after in zip(self._momentum, self._next, strict=True):
                    after[row] = before[row]
            self._momentum, self._next = self._next, self._momentum
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
            # v_t = beta v_{t-1} + (1 - beta) g_t
            torch.mul(before, self._beta, out=after)
            after.add_(block, alpha=1 - self._beta)
        return self._next


def _momentum_like(block: Tensor) -> Tensor:
    return torch.zeros_like(block, dtype=torch.promote_types(block.dtype, torch.float32))
