"""What is made of the matrix of all workers' vectors in one step."""

from dataclasses import dataclass, field
from typing import Protocol

from torch import Tensor

from lightning_byzantine.aggregators.last_aggregate import LastAggregate
from lightning_byzantine.matrix import WorkerMatrix

__all__ = ["Aggregated", "Aggregation", "PlainMean", "SingleWorker"]


@dataclass(frozen=True)
class Aggregated:
    """The result of one aggregation.

    Args:
        parts: one [c_b] tensor for each block of the matrix.
        dropped: indices of the workers whose vectors had no say, whatever they are worth.

    """

    parts: list[Tensor]
    dropped: list[int] = field(default_factory=list)


class Aggregation(Protocol):
    """Makes one vector of all workers' vectors.

    Attributes:
        takes_estimates: whether workers are to send what the estimator makes of their gradients, not the gradients.
        last_aggregate: keeps what was aggregated last, for a rule that starts from it; None for others.

    """

    takes_estimates: bool
    last_aggregate: LastAggregate | None

    def aggregate(self, matrix: WorkerMatrix) -> Aggregated:
        """Return the aggregate of the rows, the same on every rank."""

    def mean(self, matrix: WorkerMatrix) -> Aggregated:
        """Return the mean of the rows, as stock DDP would."""


class PlainMean:
    """What stock DDP does."""

    takes_estimates = False
    last_aggregate: LastAggregate | None = None

    def aggregate(self, matrix: WorkerMatrix) -> Aggregated:
        """Return the mean."""
        return self.mean(matrix)

    def mean(self, matrix: WorkerMatrix) -> Aggregated:
        """Return the mean of all rows, not by the rule Mean, which would drop what stock DDP lets through."""
        return Aggregated(matrix.materialize(matrix.mean()))


class SingleWorker(PlainMean):
    """What is left to do where there is nobody else: nothing."""

    def aggregate(self, matrix: WorkerMatrix) -> Aggregated:
        """Return the only row as it is."""
        return Aggregated([block[0] for block in matrix.blocks])
