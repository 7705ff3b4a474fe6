"""The result of a rule, before it is computed."""

from dataclasses import dataclass

import torch
from torch import Tensor

from lightning_byzantine.aggregators.report import Report
from lightning_byzantine.matrix import Combination, Measurement, Point, WorkerMatrix

__all__ = ["Decision"]


@dataclass(frozen=True)
class Decision:
    """A rule's result, to be computed on request, and the rows that it came from.

    Args:
        offered: all rows.
        measured: which of these rows can be used.
        seen: the usable rows, to which the rule was applied.
        point: the rule's result.

    """

    offered: WorkerMatrix
    measured: Measurement
    seen: WorkerMatrix
    point: Point

    def values(self) -> list[Tensor]:
        """Compute the result: one [c_b] tensor for each block, in its dtype."""
        return self.seen.materialize(self.point)

    @property
    def dropped(self) -> list[int]:
        """Indices of the workers whose rows were dropped."""
        return self.offered.workers[~self.measured.is_measurable].tolist()

    def report(self) -> Report:
        """Return what is known about each worker; needs neither a pass over the columns nor a collective."""
        rows = self.measured.is_measurable.nonzero().flatten()
        unknown = torch.full((len(rows),), torch.nan, dtype=torch.float64)
        distances, from_aggregate = self.seen.known_distances(self.point)
        seen = Report(
            torch.ones(len(rows), dtype=torch.bool),
            self.measured.norms[rows],
            self.point.weights if isinstance(self.point, Combination) else unknown,
            unknown if distances is None else distances,
            from_aggregate,
        )
        if self.seen is self.offered:
            return seen
        return seen.among(rows, self.offered.num_workers, measurable=False)
