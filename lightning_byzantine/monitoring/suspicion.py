"""Detection of workers that differ from the others for longer than chance explains."""

from dataclasses import asdict, dataclass, fields
from math import inf, isnan, log, nan
from statistics import NormalDist
from typing import Any

from lightning_byzantine.aggregators.report import Report
from lightning_byzantine.monitoring.at_the_mean import AtTheMean
from lightning_byzantine.utilities.checks import check_positive
from lightning_byzantine.utilities.medians import known_median

__all__ = ["ScoringState", "Suspicion", "score"]

# Distances that differ by less than this fraction count as equal.
_FLOOR = 0.05
# Smaller fractions of the median all count as this one: they come from momentum that decays.
_LEAST = 0.3
# Bound on the deviation of one step, so that a single step never suffices.
_MOST = 3.0
# Average deviations up to this one are attributed to chance.
_ALLOWANCE = 1.0
# Time constant of running averages, in steps.
_STEPS = 25
# A worker's change has vanished if it is below this fraction of the median worker's.
_VANISHED = 0.01
# A worker is loud if its norm and its change are over this many times the median worker's.
_LOUD = 20.0


@dataclass(frozen=True)
class ScoringState:
    """Values of earlier steps that the score of a step depends on.

    Args:
        norms: [m], the last known norm of each worker's row.
        distances: [m], likewise its distance.
        spread: running average of the spread over workers; NaN before the first.

    """

    norms: list[float]
    distances: list[float]
    spread: float

    @classmethod
    def initial(cls, num_workers: int) -> "ScoringState":
        """Return the state before the first step."""
        return cls(norms=[0.0] * num_workers, distances=[0.0] * num_workers, spread=nan)


def score(
    report: Report, state: ScoringState, memory: float, at_the_mean: list[bool]
) -> tuple[list[float], list[bool], ScoringState]:
    """Return by how much each worker stands out in one step.

    See :class:`Suspicion` for the formula.

    Args:
        report: the step's report on m workers.
        state: what the previous step returned, or :meth:`ScoringState.initial`. Not written to.
        memory: beta, the fraction of a worker's last vector that remains in its next one.
        at_the_mean: who sends the mean of others, [m].

    Returns:
        - z, [m], in [-3, 3]; NaN for workers that the report has no data on,
        - whether z is 3 regardless of the distance, [m],
        - the state for the next step.

    """
    measurable, norms, distances = report.measurable.tolist(), report.norms.tolist(), report.deviations.tolist()
    vanished = _vanished(norms, state.norms, memory)
    certain = _certain(report, vanished, _loud(norms, state.norms, memory), at_the_mean)

    values, before = (norms, state.norms) if all(map(isnan, distances)) else (distances, state.distances)
    values = [nan if gone else value for value, gone in zip(values, vanished, strict=True)]
    z, spread = _deviations(_oddities(values, before, memory), state.spread, _num_agreeing(report, values))
    z = [_MOST if sure else deviation for deviation, sure in zip(z, certain, strict=True)]

    # A row that could not be measured was dropped before momentum, even if it has a finite norm.
    entered = [norm if measured else nan for norm, measured in zip(norms, measurable, strict=True)]
    following = ScoringState(
        norms=_known_or(entered, state.norms),
        distances=_known_or(distances, state.distances),
        spread=spread,
    )
    return z, certain, following


class Suspicion:
    r"""Adds up over steps how much each worker stands out from the others (Page's cumulative sum).

    ::

        u_i  = D_i(t) - beta D_i(t-1)                       change of worker i's distance, if it sends momentum
        r_i  = log(u_i / median u) / 2 + log(D_i / median D) / 2
        z_i  = (r_i - median r) / spread                    in [-3, 3]
        S_i <- max(0, S_i + z_i - b - 1)                    suspected from S_i >= threshold until S_i = 0

    Honest workers with data from one distribution are equally likely to be the farthest in any step. u excludes what
    momentum carries over from earlier steps, so a bad batch counts for about one step.

    Who stands out is measured by more workers than liars can take along. f liars who send what one honest worker sends,
    with a little noise, are f + 1 rows in a tight cluster; for m = 2f + 1 they hold all medians, and all other honest
    workers stand out from them. So both the spread and b are k-th smallest values, k = min(f + 2, m - 1), that is of an
    honest worker that is no copy: of |r_i - median r|, as a multiple of what it is for a normal distribution, averaged
    over steps; and of the average z_i, which skewed distances raise. Then no more than m - f - 2 workers, and at least
    one, can stand out. If more do, these statistics can't tell who is right.

    Norms are used where the rule does not compute distances. z - b is 3, regardless of the distance, for a worker

    - whose row can't be measured,
    - whose norm did not change, while those of the others did,
    - whose norm and its change are both over 20 times the median worker's: f liars can't move the medians out of the
      range of the honest workers, so that all of them can be named by this at once, and nobody who is not loud,
    - that points away from the others, see :attr:`~lightning_byzantine.aggregators.Report.opposed`: as long as
      gradients shrink faster than momentum forgets, u does not show a flipped sign,
    - that sends the mean of the others in some parameter, as attacks do that move another one only, see
      :func:`~lightning_byzantine.monitoring.at_the_mean.at_the_mean`,
    - whose process was outvoted in buffers or metrics.

    Of a worker that was cleared, by an audit, only the first and the last of these count.

    Args:
        num_workers: m.
        threshold: S from which a worker is suspected, in deviations. A bad worker adds up to 2 a step.

    Attributes:
        suspected: indices of the workers under suspicion.
        scores: [m], S, at most 1.5 times the threshold.
        cleared: indices of the workers that were cleared.

    Raises:
        ValueError: if the threshold is not finite and above 0.

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
        self.threshold = check_positive("threshold", threshold)
        self.suspected: set[int] = set()
        self.scores = [0.0] * num_workers
        self.cleared: set[int] = set()
        self._beside = [0.0] * num_workers
        self._averages = [0.0] * num_workers
        self._state = ScoringState.initial(num_workers)
        self._at_the_mean = AtTheMean(num_workers)

    def update(self, report: Report, memory: float) -> None:
        """Add one step.

        Args:
            report: on m workers. Scores of workers that it has no data on do not change.
            memory: beta, the fraction of a worker's last vector that remains in its next one.

        """
        z, certain, self._state = score(report, self._state, memory, self._at_the_mean.update(report))
        known = [worker for worker, deviation in enumerate(z) if not isnan(deviation)]
        usual = _smallest([self._averages[worker] for worker in known], _num_agreeing(report, z))
        beside = _beside_statistics(report)
        for worker in known:
            # b corrects a z from distances; a certain z does not depend on them.
            excess = z[worker] - (0.0 if certain[worker] else usual)
            self._beside[worker] = self._added(self._beside[worker], _MOST if beside[worker] else 0.0)
            total = self._added(self.scores[worker], excess)
            self.scores[worker] = self._beside[worker] if worker in self.cleared else total
            self._averages[worker] += (z[worker] - self._averages[worker]) / _STEPS
        self.suspected = {
            worker
            for worker, total in enumerate(self.scores)
            if total >= self.threshold or (worker in self.suspected and total > 0)
        }

    def clear(self, worker: int) -> None:
        """Take note that a worker computes rightly: how far it stands out from the others counts no longer.

        It stays suspected if the other reasons alone suffice.
        """
        self.cleared.add(worker)
        self.scores[worker] = self._beside[worker]
        if self.scores[worker] < self.threshold:
            self.suspected.discard(worker)

    def state_dict(self) -> dict[str, Any]:
        """Return the scores, who was cleared, and the values that the next step depends on."""
        return {
            "suspected": sorted(self.suspected),
            "scores": list(self.scores),
            "cleared": sorted(self.cleared),
            "beside": list(self._beside),
            "averages": list(self._averages),
            "at_the_mean": self._at_the_mean.state_dict(),
            **asdict(self._state),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore what :meth:`state_dict` returned for the same number of workers.

        Raises:
            ValueError: if the number of workers differs, which leaves everything unchanged.

        """
        if len(state["scores"]) != len(self.scores):
            raise ValueError(f"the state is of {len(state['scores'])} workers, got num_workers={len(self.scores)}")
        self._state = ScoringState(**{field.name: state[field.name] for field in fields(ScoringState)})
        self.suspected, self.cleared = set(state["suspected"]), set(state["cleared"])
        self.scores, self._averages = list(state["scores"]), list(state["averages"])
        self._beside = list(state["beside"])
        self._at_the_mean = AtTheMean(len(self.scores))
        if "at_the_mean" in state:  # not in checkpoints of earlier versions
            self._at_the_mean.load_state_dict(state["at_the_mean"])

    def _added(self, total: float, excess: float) -> float:
        return _clamped(total + excess - _ALLOWANCE, 0.0, 1.5 * self.threshold)


def _vanished(norms: list[float], before: list[float], memory: float) -> list[bool]:
    """Return which norms hardly changed except by the decay of momentum, compared with the others', [m]."""
    changes = [abs(norm - memory * previous) for norm, previous in zip(norms, before, strict=True)]
    hardly_any = _VANISHED * known_median(changes)
    return [change < hardly_any for change in changes]


def _loud(norms: list[float], before: list[float], memory: float) -> list[bool]:
    """Return which norms are far above the others', and not only by what momentum has kept of one step, [m]."""
    changes = [norm - memory * previous for norm, previous in zip(norms, before, strict=True)]
    most, most_changed = _LOUD * known_median(norms), _LOUD * known_median(map(abs, changes))
    return [norm > most and change > most_changed for norm, change in zip(norms, changes, strict=True)]


def _certain(report: Report, vanished: list[bool], loud: list[bool], at_the_mean: list[bool]) -> list[bool]:
    """Return which workers stand out regardless of their distance, [m]."""
    reasons = [_beside_statistics(report), vanished, loud, at_the_mean, report.opposed.tolist()]
    return list(map(any, zip(*reasons, strict=True)))


def _beside_statistics(report: Report) -> list[bool]:
    """Return which workers stand out by what does not depend on how far their rows are from the others', [m]."""
    unmeasured = ~report.measurable
    return (unmeasured if report.outvoted is None else unmeasured | report.outvoted).tolist()


def _num_agreeing(report: Report, values: list[float]) -> int:
    """Return k for the workers whose value is known."""
    num_known = sum(not isnan(value) for value in values)
    seen = int((report.measurable & ~report.norms.isnan()).sum())
    return max(1, min(seen - report.num_honest + 2, num_known - 1))


def _oddities(values: list[float], before: list[float], memory: float) -> list[float]:
    """Return r, [m]: 0 for a worker like the others; NaN where unknown."""
    changes = [value - memory * previous for value, previous in zip(values, before, strict=True)]
    return [(log(one) + log(other)) / 2 for one, other in zip(_relative(changes), _relative(values), strict=True)]


def _deviations(oddities: list[float], spread: float, num_agreeing: int) -> tuple[list[float], float]:
    """Return z by the distances, [m], and the running average of the spread."""
    center = known_median(oddities)
    apart = [abs(oddity - center) for oddity in oddities if not isnan(oddity)]
    if apart:
        latest = _smallest(apart, num_agreeing) / _normal_deviation(num_agreeing, len(apart))
        # An average over steps, since that of few workers in one step is mostly noise.
        spread = latest if isnan(spread) else spread + (latest - spread) / _STEPS
    scale = _FLOOR if isnan(spread) else max(_FLOOR, spread)
    return [_clamped((oddity - center) / scale, -_MOST, _MOST) for oddity in oddities], spread


def _normal_deviation(position: int, number: int) -> float:
    """Return the absolute deviation of a normal distribution at a position of so many, in standard deviations."""
    return NormalDist().inv_cdf(0.5 + (position - 0.5) / (2 * number))


def _smallest(values: list[float], position: int) -> float:
    """Return the value at a position, counted from 1, in ascending order; NaN without values."""
    return sorted(values)[position - 1] if values else nan


def _relative(values: list[float]) -> list[float]:
    usual = known_median(map(abs, values))
    # Where the median is 0, all known ones count as equal.
    return [_clamped(value / usual if usual > 0 else 0 * value + 1, _LEAST, inf) for value in values]


def _known_or(values: list[float], otherwise: list[float]) -> list[float]:
    return [other if isnan(value) else value for value, other in zip(values, otherwise, strict=True)]


def _clamped(value: float, low: float, high: float) -> float:
    return value if isnan(value) else min(max(value, low), high)
