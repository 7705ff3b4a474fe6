"""What a rule has decided, before anybody computes it."""

from dataclasses import dataclass

import torch
from torch import Tensor

from lightning_byzantine.aggregators.report import Report
from lightning_byzantine.matrix import Combination, Point, WorkerMatrix

__all__ = ["Decision"]


@dataclass(frozen=True)
class Decision:
    """A rule's result, and how it came to it.

    Args:
        offered: all rows.
        rows: indices of the rows that the rule saw, those that can be measured.
        seen: these rows.
        point: the rule's result.

    """

    offered: WorkerMatrix
    rows: Tensor
    seen: WorkerMatrix
    point: Point

    def values(self) -> list[Tensor]:
        """Compute the result: one [c_b] tensor for each block, in its dtype."""
        return self.seen.materialize(self.point)

    def report(self) -> Report:
        """Tell what is known about each worker, without a pass over the columns and without a collective."""
        unknown = torch.full((len(self.rows),), torch.nan, dtype=torch.float64)
        distances, from_aggregate = self.seen.known_distances(self.point)
        seen = Report(
            torch.ones(len(self.rows), dtype=torch.bool),
            self.offered.known_norms()[self.rows],
            self.point.weights if isinstance(self.point, Combination) else unknown,
            unknown if distances is None else distances,
            from_aggregate,
            unlikely=self.seen.unlikely_bits(),
        )
        if self.seen is self.offered:
            return seen
        return seen.among(self.rows, self.offered.num_workers, measurable=False)
