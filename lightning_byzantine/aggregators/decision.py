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
        known = [point.weights for _, point in self._parts if isinstance(point, Combination)]
        if self._products is None or len(known) < len(self._parts):
            return None
        weights, norms = torch.stack(known), self._norms
        if weights.isnan().any() or norms.isnan().any():
            return None
        length = float(norms.median())
        # The next one could be a liar's. It is limited as well, but not 0 if f workers send what another one sends.
        farthest = min(self._num_honest, len(norms) - 1)
        usual = min(float(_lengths(self._products.sum(0)).sort().values[farthest]), length)
        squared = float(self._shares @ weights.square().sum(1))
        return Scale(length, usual * sqrt(squared))

    def report(self) -> Report:
        """Return what is known about each worker; needs neither a pass over the columns nor a collective."""
        if self.seen is self.offered:
            return self._of_seen
        rows = self.measured.is_measurable.nonzero().flatten()
        return self._of_seen.among(rows, self.offered.num_workers, measurable=False)

    def facts(self) -> list[Tensor]:
        """Return all that :meth:`report` follows from, at less expense: there may be hundreds of parts."""
        weights = [point.weights for _, point in self._parts if isinstance(point, Combination)]
        facts = [self.measured.is_measurable, self.measured.norms, *([torch.stack(weights)] if weights else [])]
        if self._products is not None:
            return [*facts, self._products, torch.stack([matrix.known_norms() for matrix, _ in self._parts])]
        distances = self.seen.distances_from_center
        return facts if distances is None else [*facts, distances]

    @cached_property
    def _of_seen(self) -> Report:
        products = None if self._products is None else self._products.sum(0)
        distances = self.seen.distances_from_center if products is None else _lengths(products)
        report = self._report(self._norms, self.point, distances)
        return replace(report, parts=self._reports_of_parts(), products=products)

    def _reports_of_parts(self) -> tuple[Report, ...]:
        """Return reports on all segments; none where their products are not known."""
        if not isinstance(self.point, Segmented) or self._products is None:
            return ()
        norms = torch.stack([matrix.known_norms() for matrix, _ in self._parts])
        found = zip(norms, self.point.points, _lengths(self._products), self._shares.tolist(), strict=True)
        reports = (self._report(*of_part) for of_part in found)
        return tuple(replace(report, products=of) for report, of in zip(reports, self._products, strict=True))

    def _report(self, norms: Tensor, point: Point, distances: Tensor | None, share: float = 1.0) -> Report:
        unknown = torch.full_like(norms, torch.nan)
        weights = point.weights if isinstance(point, Combination | Segmented) else None
        return Report(
            measurable=torch.ones_like(norms, dtype=torch.bool),
            norms=norms,
            weights=unknown if weights is None else weights,
            distances=unknown if distances is None else distances,
            from_aggregate=self._products is not None,
            share=share,
            num_honest=self._num_honest,
        )

    @cached_property
    def _parts(self) -> list[tuple[WorkerMatrix, Point]]:
        """Segments and the point in each, or all columns."""
        if isinstance(self.point, Segmented):
            return list(zip(self.seen.split(with_products=False).values(), self.point.points, strict=True))
        return [(self.seen, self.point)]

    @property
    def _shares(self) -> Tensor:
        """The fraction of all columns that each part has, [s]."""
        return self.point.shares if isinstance(self.point, Segmented) else torch.ones(1, dtype=torch.float64)

    @cached_property
    def _products(self) -> Tensor | None:
        """Inner products of the rows' differences from the point in each part, [s, m, m], if all are known."""
        known = [part for matrix, point in self._parts if (part := matrix.known_products_about(point)) is not None]
        return torch.stack(known) if len(known) == len(self._parts) else None

    @property
    def _norms(self) -> Tensor:
        return self.measured.norms[self.measured.is_measurable]

    @property
    def _num_honest(self) -> int:
        return self.seen.num_workers - self.num_byzantine


def _lengths(products: Tensor) -> Tensor:
    """Return the lengths of vectors, [.., m], from their inner products [.., m, m]."""
    return products.diagonal(dim1=-2, dim2=-1).clamp(min=0).sqrt()
