"""The result of a rule, before it is computed."""

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from lightning_byzantine.aggregators.report import Report
from lightning_byzantine.estimators.estimator import Scale
from lightning_byzantine.matrix import Combination, Measurement, Point, Segmented, WorkerMatrix

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

    def scale(self, num_byzantine: int) -> Scale | None:
        """Return how long honest vectors are, and the noise of their aggregate; None if distances are not known.

        Args:
            num_byzantine: f, of all rows.

        """
        rows = self.measured.is_measurable.nonzero().flatten()
        report = _report(self.seen, self.measured.norms[rows], self.point)
        if not report.from_aggregate or report.weights.isnan().any() or report.norms.isnan().any():
            return None
        length = float(report.norms.median())
        # The next one could be a liar's. It is limited as well, but not 0 if f workers send what another one sends.
        farthest = min(self.offered.num_workers - num_byzantine, len(rows) - 1)
        usual = min(float(report.distances.sort().values[farthest]), length)
        return Scale(length, usual * float(report.weights.norm()))

    def report(self) -> Report:
        """Return what is known about each worker; needs neither a pass over the columns nor a collective."""
        rows = self.measured.is_measurable.nonzero().flatten()
        seen = _report(self.seen, self.measured.norms[rows], self.point)
        if isinstance(self.point, Segmented):
            parts = [
                _report(part, part.known_norms(), point)
                for part, point in zip(self.seen.split().values(), self.point.points, strict=True)
            ]
            seen = replace(seen, parts=tuple(parts))
        if self.seen is self.offered:
            return seen
        return seen.among(rows, self.offered.num_workers, measurable=False)


def _report(matrix: WorkerMatrix, norms: Tensor, point: Point) -> Report:
    unknown = torch.full_like(norms, torch.nan)
    weights = point.weights if isinstance(point, Combination | Segmented) else None
    distances, from_aggregate = matrix.known_distances(point)
    return Report(
        torch.ones_like(norms, dtype=torch.bool),
        norms,
        unknown if weights is None else weights,
        unknown if distances is None else distances,
        from_aggregate,
    )
