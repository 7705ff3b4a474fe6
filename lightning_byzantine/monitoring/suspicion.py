"""Who behaves unlike the others for longer than chance allows."""

from math import inf, isfinite, isnan, log, nan
from typing import Any

from lightning_byzantine.aggregators.report import Report
from lightning_byzantine.utilities.checks import check_positive
from lightning_byzantine.utilities.medians import known_median

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


class Suspicion:
    r"""Adds up, for each worker, by how much it stands out from the others, step by step (Page's cumulative sum).

    ::

        u_i  = D_i(t) - beta D_i(t-1)                       what is new in worker i's distance, if it sends momentum
        r_i  = log(u_i / median u) / 2 + log(D_i / median D) / 2
        z_i  = (r_i - median r) / spread                    in [-3, 3]; spread: MAD over workers, averaged over steps
        S_i <- max(0, S_i + z_i - b - 1)                    suspected from S_i >= threshold until S_i = 0

    Honest workers with data from one distribution are all as likely to be the farthest in any step. What momentum
    carries on from one bad batch is not in u, so that it hardly counts for more than one step; b, the median over
    workers of their average z, is what skewed distances add to everybody's z. Where the rule knows no distances, norms
    take their place. Whatever the distance, z - b is 3 for a worker

    - whose row can't be measured,
    - with nothing new in its norm, where there is something in the others',
    - that points away from where the others go, see :attr:`~lightning_byzantine.aggregators.Report.opposed`: while
      gradients shrink faster than momentum forgets, u tells nothing of a flipped sign,
    - whose values had unlikely bits the last two times that somebody looked,
    - whose process was outvoted in buffers or metrics.

    Args:
        num_workers: m.
        threshold: S from which on a worker is suspected, in deviations; a bad worker adds up to 2 a step.

    Attributes:
        suspected: indices of the workers under suspicion.
        scores: [m], S, at most one and a half times the threshold.

    Source: Page, "Continuous Inspection Schemes", Biometrika 41 (1954).

    Example:
        >>> import torch
        >>> suspicion = Suspicion(num_workers=4)
        >>> unknown, measurable = torch.full((4,), torch.nan), torch.tensor([True, True, True, False])
        >>> for _ in range(20):
        ...     suspicion.update(Report(measurable, torch.ones(4), unknown, unknown, from_aggregate=False), memory=0.9)
        >>> suspicion.suspected
        {3}

    """

    def __init__(self, num_workers: int, threshold: float = 13.0) -> None:
        check_positive("threshold", threshold)
        self.threshold = threshold
        self.suspected: set[int] = set()
        self.scores = [0.0] * num_workers
        self._averages = [0.0] * num_workers
        self._norms = [0.0] * num_workers
        self._distances = [0.0] * num_workers
        self._unlikely = [False] * num_workers  # the last time
        self._unlikely_twice = [False] * num_workers
        self._spread = nan

    def update(self, report: Report, memory: float) -> None:
        """Take one step's report into account.

        Args:
            report: on m workers. The scores of those it knows nothing of stay as they are.
            memory: beta, the part of what a worker sent that stays in what it sends next.

        """
        if report.unlikely is not None:
            # Under double momentum, sound workers have unlikely bits in one of a hundred steps, but hardly in two.
            before, self._unlikely = self._unlikely, report.unlikely.tolist()
            self._unlikely_twice = [both == (True, True) for both in zip(before, self._unlikely, strict=True)]
        vanished = self._vanished(report, memory)
        marked = self._marked(report, vanished)
        deviations = [
            _MOST if mark else z for mark, z in zip(marked, self._deviations(report, vanished, memory), strict=True)
        ]
        known = [worker for worker, z in enumerate(deviations) if not isnan(z)]
        usual = known_median(self._averages[worker] for worker in known)
        for worker in known:
            z = deviations[worker]
            # What is usual is so of distances: nobody else has a mark.
            score = self.scores[worker] + z - (0.0 if marked[worker] else usual) - _ALLOWANCE
            self.scores[worker] = _clamped(score, 0.0, 1.5 * self.threshold)
            self._averages[worker] += (z - self._averages[worker]) / _STEPS
        self.suspected = {
            worker
            for worker, score in enumerate(self.scores)
            if score >= self.threshold or (worker in self.suspected and score > 0)
        }

    def state_dict(self) -> dict[str, Any]:
        """Return all that has been added up."""
        return {
            "suspected": sorted(self.suspected),
            "scores": list(self.scores),
            "averages": list(self._averages),
            "norms": list(self._norms),
            "distances": list(self._distances),
            "unlikely": list(self._unlikely),
            "unlikely_twice": list(self._unlikely_twice),
            "spread": self._spread,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from what :meth:`state_dict` returned for as many workers.

        Raises:
            ValueError: if it is of another number of workers, which leaves all as it was.

        """
        if len(state["scores"]) != len(self.scores):
            raise ValueError(f"the state is of {len(state['scores'])} workers, got num_workers={len(self.scores)}")
        self.suspected = set(state["suspected"])
        self.scores, self._averages = list(state["scores"]), list(state["averages"])
        self._norms, self._distances = list(state["norms"]), list(state["distances"])
        self._unlikely, self._unlikely_twice = list(state["unlikely"]), list(state["unlikely_twice"])
        self._spread = state["spread"]

    def _vanished(self, report: Report, memory: float) -> list[bool]:
        new = [abs(norm - memory * before) for norm, before in zip(report.norms.tolist(), self._norms, strict=True)]
        hardly_any = _VANISHED * known_median(new)
        return [value < hardly_any for value in new]

    def _marked(self, report: Report, vanished: list[bool]) -> list[bool]:
        """Return who stands out whatever its distance."""
        # Of quarantined ones nothing is known, so that no look at their bits follows.
        unlikely = [
            twice and not isnan(norm) for twice, norm in zip(self._unlikely_twice, report.norms.tolist(), strict=True)
        ]
        marks = [vanished, [not sound for sound in report.measurable.tolist()], report.opposed.tolist(), unlikely]
        if report.outvoted is not None:
            marks.append(report.outvoted.tolist())
        return list(map(any, zip(*marks, strict=True)))

    def _deviations(self, report: Report, vanished: list[bool], memory: float) -> list[float]:
        """Return z by the distances, [m]; NaN where nothing is known."""
        measurable, norms, distances = report.measurable.tolist(), report.norms.tolist(), report.deviations.tolist()
        values, before = (norms, self._norms) if all(map(isnan, distances)) else (distances, self._distances)
        values = [nan if gone else value for value, gone in zip(values, vanished, strict=True)]
        oddities = _oddities(values, before, memory)
        # What could not be measured, though its norm may be a number, has not entered the worker's momentum.
        entered = [norm if sound else nan for norm, sound in zip(norms, measurable, strict=True)]
        self._norms = _known_or(entered, self._norms)
        self._distances = _known_or(distances, self._distances)

        center = known_median(oddities)
        spread = known_median(abs(oddity - center) for oddity in oddities) / _MAD
        if isfinite(spread):
            # Averaged over steps, since with few workers it is a matter of luck.
            self._spread = spread if isnan(self._spread) else self._spread + (spread - self._spread) / _STEPS
        scale = _FLOOR if isnan(self._spread) else max(_FLOOR, self._spread)
        return [_clamped((oddity - center) / scale, -_MOST, _MOST) for oddity in oddities]


def _oddities(values: list[float], before: list[float], memory: float) -> list[float]:
    """Return r, [m]: 0 for a worker like the others; NaN where unknown."""
    new = [value - memory * previous for value, previous in zip(values, before, strict=True)]
    return [(log(one) + log(other)) / 2 for one, other in zip(_relative(new), _relative(values), strict=True)]


def _relative(values: list[float]) -> list[float]:
    usual = known_median(map(abs, values))
    # All alike where the most have none.
    return [_clamped(value / usual if usual > 0 else 0 * value + 1, _LEAST, inf) for value in values]


def _known_or(values: list[float], otherwise: list[float]) -> list[float]:
    return [other if isnan(value) else value for value, other in zip(values, otherwise, strict=True)]


def _clamped(value: float, low: float, high: float) -> float:
    return value if isnan(value) else min(max(value, low), high)
