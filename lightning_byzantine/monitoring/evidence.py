"""What is held against a worker."""

from collections import deque
from collections.abc import Iterator
from dataclasses import asdict, astuple, dataclass
from math import isnan, nan
from typing import Any

import torch

from lightning_byzantine.aggregators.report import Report
from lightning_byzantine.utilities.checks import check_integer_at_least
from lightning_byzantine.utilities.medians import known_median, multiples

__all__ = ["Evidence", "Suspect"]


@dataclass(frozen=True)
class Suspect:
    """A worker under suspicion, with the evidence of the last steps.

    Args:
        worker: its index.
        rank: the process that acts as this worker.
        host: the process's host.
        device: its device.
        steps: how many steps the evidence is of.
        trimmed: in how many of them it had no part in the aggregate; None if the rule does not tell.
        non_finite: in how many its row was non-finite, or too large to be measured.
        distance: median over the steps of its distance as a multiple of the median worker's; None if unknown.
        norm: likewise, of its norm.
        opposed: in how many steps it pointed away from where the others went.
        sampled: in how many of the steps somebody looked at the bits of its values.
        unlikely: in how many of these they were unlike the others'.
        outvoted: in how many of the steps its process reported a buffer or a metric that is not finite, unlike most.
        shadow: whether the rule only watched.

    Example:
        >>> print(Suspect(3, 3, "node7", "cuda:3 NVIDIA H200 4ad1", 100, 98, 0, 41.0, None, 0, 20, 0, 0, shadow=False))
        worker 3 (rank 3, host node7, cuda:3 NVIDIA H200 4ad1): trimmed in 98 of the last 100 steps, distance 41 x the \
median

    """

    worker: int
    rank: int
    host: str
    device: str
    steps: int
    trimmed: int | None
    non_finite: int
    distance: float | None
    norm: float | None
    opposed: int
    sampled: int
    unlikely: int
    outvoted: int
    shadow: bool

    def __str__(self) -> str:
        """Say it in one line."""
        of_the_last = f"of the last {self.steps} steps"
        parts = []
        if self.trimmed is not None:
            parts.append(f"{'would have been ' if self.shadow else ''}trimmed in {self.trimmed} {of_the_last}")
        if self.non_finite > 0:
            parts.append(f"non-finite in {self.non_finite} {of_the_last}")
        if self.opposed > 0:
            parts.append(f"pointed the other way in {self.opposed} {of_the_last}")
        if self.unlikely > 0:
            parts.append(f"unlikely bits in {self.unlikely} of {self.sampled} samples {of_the_last}")
        if self.outvoted > 0:
            parts.append(f"non-finite buffers or metrics in {self.outvoted} {of_the_last}")
        if self.distance is not None:
            parts.append(f"distance {self.distance:.3g} x the median")
        if self.norm is not None:
            parts.append(f"norm {self.norm:.3g} x the median")
        return f"worker {self.worker} (rank {self.rank}, host {self.host}, {self.device}): {', '.join(parts)}"

    def as_dict(self) -> dict[str, Any]:
        """Return what JSON can hold."""
        return asdict(self)


class Evidence:
    """Remembers the reports of the last steps.

    Args:
        num_workers: m.
        window: how many steps.

    Attributes:
        steps: how many reports came in the whole run.
        trimmed: [m], in how many of all steps each worker had no part in the aggregate.
        non_finite: [m], in how many its row could not be measured.

    Example:
        >>> evidence = Evidence(num_workers=3, window=100)
        >>> unknown = torch.full((3,), torch.nan)
        >>> evidence.update(Report(torch.tensor([True, False, True]), torch.ones(3), unknown, unknown, False))
        >>> evidence.of(0)["trimmed"], evidence.of(1)["trimmed"]
        (None, None)

    """

    def __init__(self, num_workers: int, window: int) -> None:
        check_integer_at_least("window", window, 1)
        self.steps = 0
        self.trimmed = [0] * num_workers
        self.non_finite = [0] * num_workers
        self._last: deque[_Step] = deque(maxlen=window)

    def update(self, report: Report) -> None:
        """Take one step's report into account."""
        step = _Step.of(report)
        self._last.append(step)
        self.trimmed = [total + (out == 1) for total, out in zip(self.trimmed, step.trimmed, strict=True)]
        self.non_finite = [total + int(bad) for total, bad in zip(self.non_finite, step.non_finite, strict=True)]
        self.steps += 1

    def latest(self) -> tuple[list[float], list[float]]:
        """Return the distances and the norms of the last step, [m] each, as multiples of the median worker's."""
        return self._last[-1].distances, self._last[-1].norms

    def trimmed_part(self) -> list[float]:
        """Return in which part of the last steps each worker had no part in the aggregate, [m]; NaN where unknown."""
        counts = [_count(step.trimmed[worker] for step in self._last) for worker in range(len(self.trimmed))]
        return [trimmed / len(self._last) if known else nan for trimmed, known in counts]

    def of(self, worker: int) -> dict[str, Any]:
        """Return what a :class:`Suspect` has to say of the last steps."""
        trimmed, known = _count(step.trimmed[worker] for step in self._last)
        unlikely, sampled = _count(step.unlikely[worker] for step in self._last)
        return {
            "steps": len(self._last),
            "trimmed": trimmed if known else None,
            "non_finite": int(sum(step.non_finite[worker] for step in self._last)),
            "distance": _none_if_unknown(known_median(step.distances[worker] for step in self._last)),
            "norm": _none_if_unknown(known_median(step.norms[worker] for step in self._last)),
            "opposed": int(sum(step.opposed[worker] for step in self._last)),
            "sampled": sampled,
            "unlikely": unlikely,
            "outvoted": int(sum(step.outvoted[worker] for step in self._last)),
        }

    def state_dict(self) -> dict[str, Any]:
        """Return all that is remembered."""
        last = torch.tensor([astuple(step) for step in self._last], dtype=torch.float64)
        return {"steps": self.steps, "trimmed": self.trimmed, "non_finite": self.non_finite, "last": last}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from what :meth:`state_dict` returned for as many workers; of a longer window, the last steps.

        Raises:
            ValueError: if it is of another number of workers, which leaves all as it was.

        """
        if len(state["trimmed"]) != len(self.trimmed):
            raise ValueError(f"the state is of {len(state['trimmed'])} workers, got num_workers={len(self.trimmed)}")
        self.steps = state["steps"]
        self.trimmed, self.non_finite = list(state["trimmed"]), list(state["non_finite"])
        self._last.clear()
        self._last.extend(_Step(*rows) for rows in state["last"].tolist())


@dataclass(frozen=True)
class _Step:
    """What one report says: [m] each, 1 for yes and NaN where unknown."""

    trimmed: list[float]
    non_finite: list[float]
    distances: list[float]
    norms: list[float]
    opposed: list[float]
    unlikely: list[float]
    outvoted: list[float]

    @classmethod
    def of(cls, report: Report) -> "_Step":
        measurable, weights = report.measurable.tolist(), report.weights.tolist()
        unknown, no = [nan] * len(measurable), [0.0] * len(measurable)
        # Rules without weights drop rows as well: these have weight 0, the others' are not known.
        told = any(weight != 0 and not isnan(weight) for weight in weights)
        return cls(
            [float(not sound or weight == 0) for sound, weight in zip(measurable, weights, strict=True)]
            if told
            else unknown,
            [float(not sound) for sound in measurable],
            multiples(report.distances.tolist()),
            multiples(report.norms.tolist()),
            list(map(float, report.opposed.tolist())),
            unknown if report.unlikely is None else list(map(float, report.unlikely.tolist())),
            no if report.outvoted is None else list(map(float, report.outvoted.tolist())),
        )


def _count(answers: Iterator[float]) -> tuple[int, int]:
    """Return how many say yes, and how many are known."""
    known = [answer for answer in answers if not isnan(answer)]
    return int(sum(known)), len(known)


def _none_if_unknown(value: float) -> float | None:
    return None if isnan(value) else value
