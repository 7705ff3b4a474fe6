"""The interface of aggregations, and the simplest of them."""

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
        dropped: indices of the workers whose vectors are unusable, or that are in quarantine.

    """

    parts: list[Tensor]
    dropped: list[int] = field(default_factory=list)


class Aggregation(Protocol):
    """Combines all workers' vectors into one.

    Attributes:
        takes_estimates: whether workers send the estimator's estimates instead of gradients.
        last_aggregate: keeps the previous aggregate, for a rule that starts from it; None for others.

    """

    takes_estimates: bool
    last_aggregate: LastAggregate | None

    def aggregate(self, matrix: WorkerMatrix) -> Aggregated:
        """Return the aggregate of the rows, the same on every rank."""

    def mean(self, matrix: WorkerMatrix) -> Aggregated:
        """Return the mean of the rows, as stock DDP would."""


class PlainMean:
    """The mean, as in stock DDP."""

    takes_estimates = False
    last_aggregate: LastAggregate | None = None

    def aggregate(self, matrix: WorkerMatrix) -> Aggregated:
        """Return the mean."""
        return self.mean(matrix)

    def mean(self, matrix: WorkerMatrix) -> Aggregated:
        """Return the mean of all rows, including non-finite ones, which the rule ``Mean`` would drop."""
        return Aggregated(matrix.materialize(matrix.mean()))


class SingleWorker(PlainMean):
    """The identity, for a single worker."""

    def aggregate(self, matrix: WorkerMatrix) -> Aggregated:
        """Return the only row."""
        return Aggregated([block[0] for block in matrix.blocks])
