"""The interface of aggregations, and the simplest of them."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from lightning_byzantine.aggregators.last_aggregate import LastAggregate
from lightning_byzantine.estimators.estimator import Scale
from lightning_byzantine.matrix import WorkerMatrix

__all__ = ["Aggregated", "Aggregation", "SingleWorker"]


@dataclass(frozen=True)
class Aggregated:
    """The result of one aggregation.

    Args:
        parts: one [c_b] tensor for each block of the matrix.
        unusable: indices of the workers whose vectors are not finite or overflow; None if not all were looked at.
        scale: of the workers' vectors, where some of them may be Byzantine and the rule knows it; None elsewhere.

    """

    parts: list[Tensor]
    unusable: frozenset[int] | None = None
    scale: Scale | None = None


class Aggregation:
    """Combines all workers' vectors into one: here by their mean, as in stock DDP.

    Attributes:
        takes_estimates: whether workers send the estimator's estimates instead of gradients.
        last_aggregate: keeps the previous aggregate, for a rule that starts from it; None for others.

    """

    takes_estimates = False
    last_aggregate: LastAggregate | None = None

    def aggregate(
        self, matrix: WorkerMatrix, unused: Sequence[Tensor] | None = None, since: Sequence[Tensor] | None = None
    ) -> Aggregated:
        """Return the aggregate of the rows, the same on every rank.

        Args:
            matrix: all workers' vectors.
            unused: for each block, the columns of parameters that take no part in this step, [c_b] bool, which are 0 in
                all rows; None if all parameters take part.
            since: for each block, where the step to the aggregate starts, [c_b]; None if nobody needs to know how far
                the workers went the same way.

        """
        return self.mean(matrix)

    def announce(self) -> None:
        """Tell observers about the last aggregate, on which all ranks agree now."""

    def fingerprint(self) -> bytes:
        """Return a digest of what the last call of :meth:`aggregate` found out about the rows besides its result."""
        return b""

    def memory(self) -> dict[str, Any]:
        """Return what :meth:`aggregate` starts from, besides the last aggregate."""
        return {}

    def restore(self, memory: dict[str, Any]) -> None:
        """Forget what happened since :meth:`memory` was called."""

    def mean(self, matrix: WorkerMatrix) -> Aggregated:
        """Return the mean of all rows, including non-finite ones, which the rule ``Mean`` would drop."""
        return Aggregated(matrix.materialize(matrix.mean()))


class SingleWorker(Aggregation):
    """The identity, for a single worker."""

    def aggregate(
        self, matrix: WorkerMatrix, unused: Sequence[Tensor] | None = None, since: Sequence[Tensor] | None = None
    ) -> Aggregated:
        """Return the only row."""
        return Aggregated([block[0] for block in matrix.blocks])
