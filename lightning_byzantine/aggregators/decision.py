"""The result of a rule, before it is computed."""

from dataclasses import dataclass, replace
from functools import cached_property
from math import sqrt

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
        num_byzantine: how many of the usable rows may be Byzantine.

    """

    offered: WorkerMatrix
    measured: Measurement
    seen: WorkerMatrix
    point: Point
    num_byzantine: int

    def values(self) -> list[Tensor]:
        """Compute the result: one [c_b] tensor for each block, in its dtype."""
        return self.seen.materialize(self.point)

    @property
    def dropped(self) -> list[int]:
        """Indices of the workers whose rows were dropped."""
        return self.offered.workers[~self.measured.is_measurable].tolist()

    def scale(self) -> Scale | None:
        """Return how long honest vectors are, and the noise of their aggregate; None if distances are not known."""
        report = self._of_seen
        if not report.from_aggregate or report.weights.isnan().any() or report.norms.isnan().any():
            return None
        length = float(report.norms.median())
        # The next one could be a liar's. It is limited as well, but not 0 if f workers send what another one sends.
        farthest = min(report.num_honest, len(report.norms) - 1)
        usual = min(float(report.distances.sort().values[farthest]), length)
        parts = report.parts or (report,)
        squared = torch.stack([part.weights for part in parts]).square().sum(1).tolist()
        noise = sum(part.share * of_part for part, of_part in zip(parts, squared, strict=True))
        return Scale(length, usual * sqrt(noise))

    def report(self) -> Report:
        """Return what is known about each worker; needs neither a pass over the columns nor a collective."""
        if self.seen is self.offered:
            return self._of_seen
        rows = self.measured.is_measurable.nonzero().flatten()
        return self._of_seen.among(rows, self.offered.num_workers, measurable=False)

    @cached_property
    def _of_seen(self) -> Report:
        norms = self.measured.norms[self.measured.is_measurable]
        parts: tuple[Report, ...] = ()
        if isinstance(self.point, Segmented):
            parts, products = self._parts(self.point)
        else:
            products = self.seen.known_products_about(self.point)
        distances = self.seen.distances_from_center if products is None else _lengths(products)
        report = self._report(norms, self.point, distances, from_aggregate=products is not None)
        return replace(report, parts=parts, products=products)

    def _parts(self, joined: Segmented) -> tuple[tuple[Report, ...], Tensor | None]:
        """Return reports on all segments, and the sum of their inner products; nothing where these are not known."""
        matrices = list(self.seen.split(with_products=False).values())
        pairs = zip(matrices, joined.points, strict=True)
        known = [part for matrix, point in pairs if (part := matrix.known_products_about(point)) is not None]
        if len(known) < len(matrices):
            return (), None
        products = torch.stack(known)
        norms = torch.stack([matrix.known_norms() for matrix in matrices])
        # Without products: many matrices that nobody needs on their own.
        reports = tuple(
            self._report(*part, from_aggregate=True)
            for part in zip(norms, joined.points, _lengths(products), joined.shares.tolist(), strict=True)
        )
        return reports, products.sum(0)

    def _report(
        self, norms: Tensor, point: Point, distances: Tensor | None, share: float = 1.0, *, from_aggregate: bool
    ) -> Report:
        weights = point.weights if isinstance(point, Combination | Segmented) else None
        unknown = torch.full_like(norms, torch.nan)
        return Report(
            measurable=torch.ones_like(norms, dtype=torch.bool),
            norms=norms,
            weights=unknown if weights is None else weights,
            distances=unknown if distances is None else distances,
            from_aggregate=from_aggregate,
            share=share,
            num_honest=self.seen.num_workers - self.num_byzantine,
        )


def _lengths(products: Tensor) -> Tensor:
    """Return the lengths of vectors, [.., m], from their inner products [.., m, m]."""
    return products.diagonal(dim1=-2, dim2=-1).clamp(min=0).sqrt()
