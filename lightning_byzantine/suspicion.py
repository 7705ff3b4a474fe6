"""Who behaves unlike the others for longer than chance allows."""

import torch
from torch import Tensor, nn

from lightning_byzantine.checks import check_positive
from lightning_byzantine.report import Report

__all__ = ["Suspicion"]

# Median absolute deviation of a normal distribution, in standard deviations.
_MAD = 0.6745
# Distances that differ by less than this part are taken for equal.
_FLOOR = 0.05
# What is less than this part of the median says nothing more: momentum that is running out.
_LEAST = 0.3
# How far one step counts, in deviations: no single one, however odd, is persistent.
_MOST = 3.0
# What stays below this on average is chance.
_ALLOWANCE = 1.0
# Averages over steps are over about this many.
_STEPS = 25
# What is new in a vector has vanished where it is below this part of what is new in the others'.
_VANISHED = 0.01


class Suspicion(nn.Module):
    r"""Adds up, for each worker, by how much it stands out from the others, step by step (Page's cumulative sum).

    ::

        u_i  = D_i(t) - beta D_i(t-1)                       what is new in worker i's distance, if it sends momentum
        r_i  = log(u_i / median u) / 2 + log(D_i / median D) / 2
        z_i  = (r_i - median r) / spread                    in [-3, 3]; spread: MAD over workers, averaged over steps
        S_i <- max(0, S_i + z_i - b - 1)                    suspected from S_i >= threshold until S_i = 0

    Honest workers with data from one distribution are all as likely to be the farthest in any step. What momentum
    carries on from one bad batch is not in u, so that it hardly counts for more than one step; b, the median over
    workers of their average z, is what skewed distances add to everybody's z. A worker whose row can't be measured has
    z = 3, and so has one with nothing new in its norm where there is something in the others', one whose values have
    unlikely bits, and one whose process was outvoted in buffers or metrics. Where the rule knows no distances, norms
    take their place.

    Args:
        num_workers: m.
        threshold: S from which on a worker is suspected, in deviations; a bad worker adds up to 2 a step.

    Attributes:
        suspected: [m] bool.
        scores: [m], S, at most one and a half times the threshold.

    Source: Page, "Continuous Inspection Schemes", Biometrika 41 (1954).

    Example:
        >>> suspicion = Suspicion(num_workers=4)
        >>> unknown, measurable = torch.full((4,), torch.nan), torch.tensor([True, True, True, False])
        >>> for _ in range(20):
        ...     suspicion.update(Report(measurable, torch.ones(4), unknown, unknown, from_aggregate=False), memory=0.9)
        >>> suspicion.suspected
        tensor([False, False, False,  True])

    """

    suspected: Tensor
    scores: Tensor
    _averages: Tensor
    _norms: Tensor
    _distances: Tensor
    _spread: Tensor

    def __init__(self, num_workers: int, threshold: float = 13.0) -> None:
        super().__init__()
        check_positive("threshold", threshold)
        self.threshold = threshold
        self.register_buffer("suspected", torch.zeros(num_workers, dtype=torch.bool))
        for name in ("scores", "_averages", "_norms", "_distances"):
            self.register_buffer(name, torch.zeros(num_workers, dtype=torch.float64))
        self.register_buffer("_spread", torch.full((), torch.nan, dtype=torch.float64))

    def update(self, report: Report, memory: float) -> None:
        """Take one step's report into account.

        Args:
            report: on m workers. The scores of those it knows nothing of stay as they are.
            memory: beta, the part of what a worker sent that stays in what it sends next.

        """
        z = self._deviations(report, memory)
        seen = ~z.isnan()
        scores = self.scores + z - _median(self._averages[seen]) - _ALLOWANCE
        self.scores = torch.where(seen, scores.clamp(0, 1.5 * self.threshold), self.scores)
        self._averages = torch.where(seen, self._averages.lerp(z, 1 / _STEPS), self._averages)
        self.suspected = (self.scores >= self.threshold) | (self.suspected & (self.scores > 0))

    def _deviations(self, report: Report, memory: float) -> Tensor:
        """Return z, [m]."""
        norms, distances = report.norms, report.deviations
        new_norms = (norms - memory * self._norms).abs()
        vanished = new_norms < _VANISHED * _median(new_norms)
        if distances.isnan().all():
            oddity = _oddity(norms, self._norms, memory, vanished)
        else:
            oddity = _oddity(distances, self._distances, memory, vanished)
        # What could not be measured, though its norm may be a number, has not entered the worker's momentum.
        self._norms = torch.where(norms.isnan() | ~report.measurable, self._norms, norms)
        self._distances = torch.where(distances.isnan(), self._distances, distances)
        center = _median(oddity)
        spread = _median((oddity - center).abs()) / _MAD
        if spread.isfinite():
            # Averaged over steps, since with few workers it is a matter of luck.
            self._spread = spread if self._spread.isnan() else self._spread.lerp(spread, 1 / _STEPS)
        z = ((oddity - center) / self._spread.clamp(min=_FLOOR)).clamp(-_MOST, _MOST)
        z[vanished | ~report.measurable] = _MOST
        for odd in (report.unlikely, report.outvoted):
            if odd is not None:
                z[odd] = _MOST
        return z


def _oddity(values: Tensor, previous: Tensor, memory: float, left_out: Tensor) -> Tensor:
    """Return r, [m]: 0 for a worker like the others; NaN where unknown, and for those that are left out."""
    values = torch.where(left_out, torch.nan, values)
    new = values - memory * previous
    return (_relative(new).log() + _relative(values).log()) / 2


def _relative(values: Tensor) -> Tensor:
    median = _median(values.abs())
    # All alike where the most have none.
    return torch.where(median > 0, (values / median).clamp(min=_LEAST), torch.where(values.isnan(), torch.nan, 1.0))


def _median(values: Tensor) -> Tensor:
    """Return the median of those that are known; of an even number, the mean of the middle two, as torch's is not."""
    return values.nanquantile(0.5) if values.numel() > 0 else values.new_tensor(0.0)
