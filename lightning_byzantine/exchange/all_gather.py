"""The exchange in which every rank aggregates for itself."""

from collections.abc import Callable, Sequence

from torch import Tensor

from lightning_byzantine.exchange.case import Case
from lightning_byzantine.exchange.collectives import start_gather
from lightning_byzantine.exchange.exchange import AnyOutcome, Exchange, Wait
from lightning_byzantine.exchange.shards import Shards
from lightning_byzantine.exchange.witnesses import Witnesses
from lightning_byzantine.matrix import Names, Segments, WorkerMatrix

__all__ = ["AllGather"]


class AllGather(Exchange):
    """Every rank receives every worker's vector and aggregates for itself, without trusting any other rank.

    A rank receives (m - k) d elements and holds (m + 1) d: all vectors, and the result. With witnesses, a
    rank that sends others different vectors can't make them aggregate different ones, see
    :class:`~lightning_byzantine.exchange.case.Case`.

    Args:
        num_ranks: number of processes, m / k.
        witnesses: compare what ranks tell each other; None for ranks that trust each other in this.
        shards: where a rank holds a part of its worker's vector only.

    """

    def __init__(self, num_ranks: int, witnesses: Witnesses | None = None, shards: Shards | None = None) -> None:
        super().__init__(witnesses, shards)
        self._num_ranks = num_ranks
        self._case: Case | None = None
        self._num_missing = 0
        self._layout: tuple[Names, ...] | None = None
        self._segments: Segments | None = None

    def allocate(self, num_rows: int, num_columns: int, like: Tensor) -> Tensor:
        """Return the memory of this rank's rows of the matrix, so that they need no copy."""
        received = self._received.get(len(self._started), like, self._num_ranks * num_rows, num_columns)
        return received[self.rank * num_rows : (self.rank + 1) * num_rows]

    def let_go(self) -> bool:
        """Keep the matrix."""
        return False

    def send(self, index: int, rows: Tensor) -> tuple[Tensor, list[Wait]]:
        """Gather one block asynchronously, while backward continues."""
        received = self._received.get(index, rows, self._num_ranks * rows.shape[0], rows.shape[1])
        return received, start_gather(received.view(-1), rows.view(-1), self._group)

    def finish(
        self,
        layout: tuple[Names, ...] | None = None,
        cleared: Sequence[Tensor] | None = None,
        segments: Segments | None = None,
    ) -> WorkerMatrix:
        """Return all blocks as a matrix; ranks exchange nonces as soon as all have arrived."""
        self._layout, self._segments = layout, segments
        if self._witnesses is not None:
            self._num_missing = len(self._started)
            for _, waits in self._started:
                waits.append(self._count_arrival)
        return super().finish(layout, cleared, segments)

    def agreed(
        self,
        matrix: WorkerMatrix,
        attempt: Callable[[WorkerMatrix], AnyOutcome],
        save: Callable[[], Callable[[], object]],
    ) -> AnyOutcome:
        """Return what follows from the rows that all honest ranks have.

        Raises:
            EquivocationError: if more ranks are proved to be faulty than may be, or honest ranks compute different
                results from the same rows.

        """
        if self._witnesses is None:
            return attempt(matrix)
        restart = save()
        if self._witnesses.conflicts.pairs:
            list(self._arriving)  # some rows come on a detour after all others, into blocks that have arrived
        outcome = attempt(matrix)
        list(self._arriving)  # there may be blocks that it did not read
        assert self._case is not None
        case, self._case = self._case, None
        if not case.is_disputed(outcome.digest(case.key())):
            return outcome
        case.settle()
        while True:
            restart()
            outcome = attempt(self.matrix(self._arriving, self._layout, self._segments))
            if case.is_final(outcome.digest(None), outcome.digest(case.key())):
                return outcome

    def _count_arrival(self) -> None:
        self._num_missing -= 1
        if self._num_missing == 0 and self._witnesses is not None:
            self._case = Case(self._witnesses, self._arriving.memory)
            self._case.reveal()
