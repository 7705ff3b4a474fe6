"""Evidence about each worker from the reports of the last steps."""

from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, fields
from math import isnan, nan
from typing import Any

import torch

from lightning_byzantine.aggregators.report import Report
from lightning_byzantine.utilities.checks import check_integer_at_least
from lightning_byzantine.utilities.medians import known_median, multiples

__all__ = ["Evidence"]


class Evidence:
    """Keeps the evidence of the last steps, and counts over the whole run.

    Args:
        num_workers: m.
        window: number of steps to keep.

    Attributes:
        steps: number of reports in the whole run.
        trimmed: [m], number of these in which each worker did not contribute to the aggregate; a step in which it did
            to some columns only counts by the fraction of the others.
        non_finite: [m], number of these in which its row could not be measured.

    Raises:
        ValueError: if the window is below 1.

    Example:
        >>> evidence = Evidence(num_workers=3, window=100)
        >>> unknown = torch.full((3,), torch.nan)
        >>> evidence.update(Report(torch.tensor([True, False, True]), torch.ones(3), unknown, unknown, False))
        >>> evidence.of(1)["non_finite"], evidence.of(1)["trimmed"]
        (1, None)

    """

    def __init__(self, num_workers: int, window: int) -> None:
        check_integer_at_least("window", window, 1)
        self.steps = 0
        self.trimmed = [0.0] * num_workers
        self.non_finite = [0] * num_workers
        self._last: deque[_Step] = deque(maxlen=window)

    def update(self, report: Report) -> None:
        """Add one step's report."""
        step = _Step.of(report)
        self._last.append(step)
        self.trimmed = [
            total if isnan(out) else total + out for total, out in zip(self.trimmed, step.trimmed, strict=True)
        ]
        self.non_finite = [total + int(bad) for total, bad in zip(self.non_finite, step.non_finite, strict=True)]
        self.steps += 1

    def latest(self) -> tuple[list[float], list[float]]:
        """Return the distances and the norms of the last step, [m] each, as multiples of the median worker's."""
        return self._last[-1].distances, self._last[-1].norms

    def trimmed_part(self) -> list[float]:
        """Return the fraction of the last steps in which each worker did not contribute, [m]; NaN where unknown."""
        sums = [_total(step.trimmed[worker] for step in self._last) for worker in range(len(self.trimmed))]
        return [trimmed / len(self._last) if known else nan for trimmed, known in sums]

    def of(self, worker: int) -> dict[str, Any]:
        """Return the fields of a :class:`~lightning_byzantine.monitoring.Suspect` that are about the last steps."""
        trimmed, known = _total(step.trimmed[worker] for step in self._last)
        return {
            "steps": len(self._last),
            "trimmed": round(trimmed, 1) if known else None,
            "non_finite": int(sum(step.non_finite[worker] for step in self._last)),
            "distance": _none_if_unknown(known_median(step.distances[worker] for step in self._last)),
            "norm": _none_if_unknown(known_median(step.norms[worker] for step in self._last)),
            "opposed": int(sum(step.opposed[worker] for step in self._last)),
            "outvoted": int(sum(step.outvoted[worker] for step in self._last)),
            "equivocated": int(sum(step.equivocated[worker] for step in self._last)),
        }

    def scalars(self, weights: list[float], scores: list[float]) -> dict[str, float]:
        """Return what to log by name, ``byzantine/distance/worker_0`` and so on, without what is unknown.

        Args:
            weights: [m], of the last step's report.
            scores: [m], of suspicion, as multiples of the threshold.

        """
        distances, norms = self.latest()
        rows: dict[str, Sequence[float]] = {
            "distance": distances,
            "norm": norms,
            "weight": weights,
            "trimmed": self.trimmed_part(),
            "non_finite": self.non_finite,
            "score": scores,
        }
        return {
            f"byzantine/{name}/worker_{worker}": value
            for name, row in rows.items()
            for worker, value in enumerate(row)
            if not isnan(value)
        }

    def state_dict(self) -> dict[str, Any]:
        """Return the counts, and the last steps by kind of evidence, as float64 tensors [steps, m]."""
        steps = [asdict(step) for step in self._last]
        last = {kind: torch.tensor([step[kind] for step in steps], dtype=torch.float64) for kind in _Step.kinds()}
        return {"steps": self.steps, "trimmed": self.trimmed, "non_finite": self.non_finite, "last": last}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore what :meth:`state_dict` returned for the same number of workers.

        The last steps are kept if it has a longer window.

        Raises:
            ValueError: if the number of workers differs, which leaves everything unchanged.
            KeyError: likewise, if a kind of evidence is missing.

        """
        if len(state["trimmed"]) != len(self.trimmed):
            raise ValueError(f"the state is of {len(state['trimmed'])} workers, got num_workers={len(self.trimmed)}")
        last = {kind: state["last"][kind].tolist() for kind in _Step.kinds()}
        self.steps = state["steps"]
        self.trimmed, self.non_finite = list(state["trimmed"]), list(state["non_finite"])
        self._last.clear()
        self._last.extend(_Step(*rows) for rows in zip(*last.values(), strict=True))


@dataclass(frozen=True)
class _Step:
    """Evidence from one report: [m] each, with 1 for yes, 0 for no, parts of 1 for parts, and NaN where unknown."""

    trimmed: list[float]
    non_finite: list[float]
    distances: list[float]
    norms: list[float]
    opposed: list[float]
    outvoted: list[float]
    equivocated: list[float]

    @classmethod
    def kinds(cls) -> list[str]:
        """Return what there is evidence of, by name."""
        return [field.name for field in fields(cls)]

    @classmethod
    def of(cls, report: Report) -> "_Step":
        measurable = report.measurable.tolist()
        unknown, no = [nan] * len(measurable), [0.0] * len(measurable)
        # A rule without weights drops rows as well: these have weight 0, and the other weights are unknown.
        has_weights = any(weight != 0 and not isnan(weight) for weight in report.weights.tolist())
        return cls(
            trimmed=report.left_out.tolist() if has_weights else unknown,
            non_finite=[float(not measured) for measured in measurable],
            distances=multiples(report.distances.tolist()),
            norms=multiples(report.norms.tolist()),
            opposed=list(map(float, report.opposed.tolist())),
            outvoted=no if report.outvoted is None else list(map(float, report.outvoted.tolist())),
            equivocated=no if report.equivocated is None else list(map(float, report.equivocated.tolist())),
        )


def _total(answers: Iterator[float]) -> tuple[float, int]:
    """Return the sum of the answers that are known, and their number."""
    known = [answer for answer in answers if not isnan(answer)]
    return sum(known), len(known)


def _none_if_unknown(value: float) -> float | None:
    return None if isnan(value) else value
