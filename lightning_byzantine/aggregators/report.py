"""Statistics of each worker from one aggregation."""

from collections.abc import Collection, Iterable
from dataclasses import dataclass
from functools import cached_property
from math import inf, nan

import torch
from torch import Tensor

from lightning_byzantine.aggregators.certificate import distance_from_honest_mean
from lightning_byzantine.utilities.medians import known_median

__all__ = ["Report"]

# A weight below this fraction of an equal one counts as none: clipping moves some weight to a center of all rows.
_NEGLIGIBLE = 0.05
# Cosines up to this one can be a rounded 1; larger ones are nothing but rounding error.
_ROUNDED_ONE = 1.001
# A row without which less than this weight is left is the aggregate.
_ALONE = 1e-9
# From this median alignment on, noise alone does not reverse an honest worker's direction.
_COMMON = 0.5
# A worker is opposed if its alignment is below minus this fraction of the median.
_OPPOSED = 0.5


@dataclass(frozen=True)
class Report:
    """Statistics of the workers' rows that the rule computes anyway, the same on every rank.

    All are float64 on the CPU, [m], and NaN where the rule does not compute them:

    ==================================  =======  =========  ========================================
    rule                                weights  distances  distances from
    ==================================  =======  =========  ========================================
    any that combines rows and uses
    their inner products                yes      yes        the aggregate
    ``CTMA`` over a coordinate-wise     yes      yes        the base rule's result
    ``Mean``                            yes      no
    coordinate-wise                     no       no
    ==================================  =======  =========  ========================================

    Args:
        measurable: [m] bool: rows that are finite and whose norm does not overflow.
        norms: [m], ||x_i||.
        weights: [m], the weight of x_i in the aggregate sum_i w_i x_i.
        distances: [m], from the aggregate or, as in the table, from the base rule's result.
        from_aggregate: whether distances are from the aggregate.
        outvoted: [m] bool: workers whose process reported a non-finite buffer or metric where the majority reported
            finite ones; None if there were none.
        equivocated: [m] bool: workers whose process was proved, since the report before, to have told others different
            things in one exchange, or to have computed another result from what all received. From this step on, their
            rows are dropped. None if there were none.
        parts: reports on each parameter, of a rule that decides in each; then weights are averages over all columns.
        share: the fraction of all columns that this report is about; below 1 in :attr:`parts`.
        products: [m, m], inner products of the rows' differences from the aggregate; NaN for rows that the rule has not
            seen, None where they are not known.
        num_honest: how many of the rows that the rule has seen are honest, at least.

    Example:
        >>> from lightning_byzantine.aggregators import Krum
        >>> from lightning_byzantine.matrix import WorkerMatrix
        >>> rows = torch.tensor([[1.0], [1.5], [9.0], [2.5]])
        >>> Krum().decide(WorkerMatrix([rows]), num_byzantine=1).report().trimmed
        tensor([ True, False,  True,  True])

    """

    measurable: Tensor
    norms: Tensor
    weights: Tensor
    distances: Tensor
    from_aggregate: bool
    outvoted: Tensor | None = None
    equivocated: Tensor | None = None
    parts: tuple["Report", ...] = ()
    share: float = 1.0
    products: Tensor | None = None
    num_honest: int = 0

    @classmethod
    def of_breakdown(cls, dropped: Iterable[int], num_workers: int) -> "Report":
        """Return the report of a step without a result, because more than ``num_byzantine`` rows were dropped."""
        measurable = torch.ones(num_workers, dtype=torch.bool)
        measurable[list(dropped)] = False
        unknown = torch.full((num_workers,), torch.nan, dtype=torch.float64)
        return cls(measurable, unknown, unknown, unknown, from_aggregate=False)

    @property
    def trimmed(self) -> Tensor:
        """Rows that hardly contribute to the aggregate, [m] bool: dropped ones, and those of weights below 1 / 20 m."""
        return ~self.measurable | (self.weights < _NEGLIGIBLE / len(self.weights))

    @property
    def left_out(self) -> Tensor:
        """The fraction of the columns to which each row hardly contributes, [m]; 0 where its weight is not known."""
        if not self.parts:
            return self.trimmed.double()
        left_out = torch.stack([part.share * part.left_out for part in self.parts]).sum(0)
        return torch.where(self.trimmed, 1.0, left_out)  # a sum of all shares may be rounded

    @property
    def deviations(self) -> Tensor:
        """Distance of each row from the weighted mean of the others, [m].

        ||x_i - sum_{j != i} w_j x_j / (1 - w_i)|| = ||x_i - sum_j w_j x_j|| / (1 - w_i): a row pulls the aggregate
        towards itself, so that rows with a weight would seem nearer than equal ones without. NaN for a row that is the
        aggregate; if it is so in some :attr:`parts` only, it counts as the median row of these.
        """
        if not self.from_aggregate:
            return self.distances
        _, distances, weights = self._of_parts()
        apart = torch.where(1 - weights > _ALONE, distances / (1 - weights), nan)
        usual = apart.nanmedian(1, keepdim=True).values.nan_to_num(0)
        squared = torch.where(apart.isnan(), usual, apart).square().sum(0)
        return torch.where(apart.isnan().all(0), nan, squared.sqrt())

    def certificate(self, liars: Collection[int] = ()) -> float | None:
        """Return an upper bound of the distance between the aggregate and the mean of all honest rows.

        It holds whichever rows are honest, if there are no more Byzantine workers than the rule was told. See
        :func:`~lightning_byzantine.aggregators.certificate.distance_from_honest_mean` for the formula.

        Args:
            liars: indices of workers that are known to be Byzantine, which lowers the bound. Those whose rows were
                dropped are known anyway.

        Returns:
            The bound, in the unit of the rows; None if the rule does not know the distances from the aggregate, or if
            there are more liars than there may be.

        Example:
            >>> from lightning_byzantine.aggregators import CTMA, GeometricMedian
            >>> from lightning_byzantine.matrix import WorkerMatrix
            >>> rows = torch.tensor([[3.0, 0.0], [-3.0, 0.0], [0.0, 3.0], [0.0, -3.0], [0.0, 80.0]])
            >>> report = CTMA(GeometricMedian()).decide(WorkerMatrix([rows]), num_byzantine=1).report()
            >>> round(report.certificate(), 2), report.certificate(liars=[4])  # the aggregate is 0
            (22.57, 0.0)

        """
        if self.products is None:
            return None
        candidates = ~self.products.diagonal().isnan()
        candidates[list(liars)] = False
        if int(candidates.sum()) < self.num_honest:
            return None
        return distance_from_honest_mean(self.products[candidates][:, candidates], self.num_honest)

    @property
    def alignments(self) -> Tensor:
        """Cosine of the angle between each row and the weighted mean of the others, [m].

        <x_i, a_i> / (||x_i|| ||a_i||) with a_i = sum_{j != i} w_j x_j; NaN where one of them is 0, and where distances
        from the aggregate are not known. Norms and distances are enough: <x_i, a> of the aggregate a is
        (||a||^2 + ||x_i||^2 - ||x_i - a||^2) / 2, and ||a||^2 is a weighted sum of these products.
        """
        if not self.from_aggregate:
            return torch.full_like(self.norms, torch.nan)
        norms, distances, weights = self._of_parts()
        excess = norms.square() - distances.square()
        known = ~(weights * excess).isnan()
        squared_length = (weights * excess).nansum(1, keepdim=True) / (2 - (weights * known).nansum(1, keepdim=True))
        product, own = (squared_length + excess) / 2, weights * norms.square()
        squared_others = (squared_length - weights * (2 * product - own)).sum(0).clamp(min=0)
        # Not the root of one product, which could leave float64's range.
        cosines = (product - own).sum(0) / (self.norms * squared_others.sqrt())
        return torch.where(cosines.abs() <= _ROUNDED_ONE, cosines, nan)

    def _of_parts(self) -> tuple[Tensor, Tensor, Tensor]:
        """Return norms, distances and weights of all parts, [s, m] each; of the whole if there are none."""
        reports = self.parts or (self,)
        norms, distances, weights = zip(*((one.norms, one.distances, one.weights) for one in reports), strict=True)
        return torch.stack(norms), torch.stack(distances), torch.stack(weights)

    @cached_property
    def opposed(self) -> Tensor:
        """Rows that point away from the others, [m] bool.

        c_i < -median c / 2, where c are the known alignments, provided that the workers agree on a direction:
        median c >= 0.5.
        """
        alignments = self.alignments
        common = known_median(alignments.tolist())
        return alignments < (-_OPPOSED * common if common >= _COMMON else -inf)

    def among(self, workers: Tensor, num_workers: int, measurable: bool) -> "Report":
        """Return this report extended to all workers; the added ones have weight 0.

        Args:
            workers: indices of the workers in this report, in its order.
            num_workers: number of all workers.
            measurable: whether the added rows are measurable.

        """

        def spread(values: Tensor, missing: float) -> Tensor:
            whole = values.new_full((num_workers, *values.shape[1:]), missing)
            whole[workers] = values
            return whole

        return Report(
            spread(self.measurable, measurable),
            spread(self.norms, torch.nan),
            # Known even where the weights of the rule are not.
            spread(self.weights, 0.0),
            spread(self.distances, torch.nan),
            self.from_aggregate,
            parts=tuple(part.among(workers, num_workers, measurable) for part in self.parts),
            share=self.share,
            products=None if self.products is None else spread(spread(self.products, nan).T, nan),
            num_honest=self.num_honest,
        )
