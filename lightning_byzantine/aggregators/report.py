"""What one aggregation found out about each worker."""

from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property
from math import inf, isnan, nan, sqrt

import torch
from torch import Tensor

from lightning_byzantine.utilities.medians import known_median

__all__ = ["Report"]

# A cosine that rounding may have made of 1; beyond it there was but rounding.
_ROUNDED_ONE = 1.001
# From this median alignment on, the workers have so much in common that noise turns nobody around.
_COMMON = 0.5
# Whose alignment is below minus this part of the median's points the other way.
_OPPOSED = 0.5


@dataclass(frozen=True)
class Report:
    """Statistics of the workers' rows that the rule needed anyway, the same on every rank.

    All are float64 on the CPU, [m], and NaN where the rule did not learn them:

    ==================================  =======  =========  ========================================
    rule                                weights  distances  distances from
    ==================================  =======  =========  ========================================
    any whose result combines rows and
    that uses inner products            yes      yes        the aggregate
    ``CTMA`` over a coordinate-wise     yes      yes        the base rule's result
    ``Mean``                            yes      no
    coordinate-wise                     no       no
    ==================================  =======  =========  ========================================

    Args:
        measurable: [m] bool: rows that are finite and whose norm does not overflow.
        norms: [m], ||x_i||.
        weights: [m], the part of x_i in the aggregate sum_i w_i x_i.
        distances: [m], from the aggregate or, as the table says, from the center that the rule measured from.
        from_aggregate: which of the two.
        outvoted: [m] bool: workers whose process has reported a buffer or a metric that is not finite, where most have
            reported finite ones; None where nobody was.
        unlikely: [m] bool: rows that have bits unlike the others', see
            :func:`~lightning_byzantine.aggregation.mantissas.unlikely_bits`; None where nobody looked.

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
    unlikely: Tensor | None = None

    @classmethod
    def of_breakdown(cls, dropped: Iterable[int], num_workers: int) -> "Report":
        """Return what is known where more rows than num_byzantine are dropped, so that no rule ran."""
        measurable = torch.ones(num_workers, dtype=torch.bool)
        measurable[list(dropped)] = False
        unknown = torch.full((num_workers,), torch.nan, dtype=torch.float64)
        return cls(measurable, unknown, unknown, unknown, from_aggregate=False)

    @property
    def trimmed(self) -> Tensor:
        """Which rows have no part in the aggregate, [m] bool: dropped ones, and those of weight 0."""
        return ~self.measurable | (self.weights == 0)

    @property
    def deviations(self) -> Tensor:
        """Return how far each row is from what the others make of the aggregate, [m].

        ||x_i - sum_{j != i} w_j x_j / (1 - w_i)|| = ||x_i - sum_j w_j x_j|| / (1 - w_i): a row pulls the aggregate
        towards itself, so that even among equals those with a part in it are nearer to it. NaN for a row that is the
        aggregate.
        """
        if not self.from_aggregate:
            return self.distances
        pairs = zip(self.distances.tolist(), self.weights.tolist(), strict=True)
        apart = [distance / (1 - weight) if 1 - weight > 1e-9 else nan for distance, weight in pairs]
        return torch.tensor(apart, dtype=torch.float64)

    @property
    def alignments(self) -> Tensor:
        """Return the cosine of the angle between each row and what the others make of the aggregate, [m].

        <x_i, a_i> / (||x_i|| ||a_i||) with a_i = sum_{j != i} w_j x_j; NaN where it has no length, and where the rule
        did not learn the distances from the aggregate. No other products are needed, for those with the aggregate a are
        (||a||^2 + ||x_i||^2 - ||x_i - a||^2) / 2, and ||a||^2 is a weighted sum of them.
        """
        if not self.from_aggregate:
            return torch.full_like(self.norms, torch.nan)
        norms, distances, weights = self.norms.tolist(), self.distances.tolist(), self.weights.tolist()
        excess = [norm * norm - distance * distance for norm, distance in zip(norms, distances, strict=True)]
        known = [(weight, e) for weight, e in zip(weights, excess, strict=True) if not isnan(weight * e)]
        squared_length = sum(weight * e for weight, e in known) / (2 - sum(weight for weight, _ in known))
        cosines = []
        for norm, weight, e in zip(norms, weights, excess, strict=True):
            product, own = (squared_length + e) / 2, weight * norm * norm
            squared_others = squared_length - weight * (2 * product - own)
            # Not by the root of one product, which would leave float64's range.
            lengths = norm * sqrt(squared_others) if squared_others > 0 else 0.0
            cosine = (product - own) / lengths if lengths > 0 else nan
            cosines.append(cosine if abs(cosine) <= _ROUNDED_ONE else nan)
        return torch.tensor(cosines, dtype=torch.float64)

    @cached_property
    def opposed(self) -> Tensor:
        """Return which rows point away from where the others go, [m] bool.

        c_i < -median c / 2, as long as the workers go somewhere together, median c >= 0.5, with c the alignments that
        are known.
        """
        alignments = self.alignments
        common = known_median(alignments.tolist())
        return alignments < (-_OPPOSED * common if common >= _COMMON else -inf)

    def among(self, workers: Tensor, num_workers: int, measurable: bool) -> "Report":
        """Return the report on all workers, of which this one knows some; the others have no part in the aggregate.

        Args:
            workers: indices of those this report is on, in its order.
            num_workers: number of all.
            measurable: whether the others are.

        """

        def spread(values: Tensor, missing: float) -> Tensor:
            whole = values.new_full((num_workers,), missing)
            whole[workers] = values
            return whole

        return Report(
            spread(self.measurable, measurable),
            spread(self.norms, torch.nan),
            # Where the rule has no weights, theirs is known all the same.
            spread(self.weights, 0.0),
            spread(self.distances, torch.nan),
            self.from_aggregate,
            unlikely=None if self.unlikely is None else spread(self.unlikely, False),
        )
