"""What is held against a worker."""

from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn

from lightning_byzantine.checks import check_integer_at_least
from lightning_byzantine.report import Report

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
        unlikely: in how many of the steps its values had bits unlike the others'.
        outvoted: in how many of the steps its process reported a buffer or a metric that is not finite, unlike most.
        shadow: whether the rule only watched.

    Example:
        >>> print(Suspect(3, 3, "node7", "cuda:3 NVIDIA H200 4ad1", 100, 98, 0, 41.0, None, 0, 0, shadow=False))
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
        if self.unlikely > 0:
            parts.append(f"unlikely bits in {self.unlikely} {of_the_last}")
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


class Evidence(nn.Module):
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
        >>> evidence.of(1)
        {'steps': 1, 'trimmed': None, 'non_finite': 1, 'distance': None, 'norm': 1.0, 'unlikely': 0, 'outvoted': 0}

    """

    steps: Tensor
    trimmed: Tensor
    non_finite: Tensor
    _history: Tensor

    def __init__(self, num_workers: int, window: int) -> None:
        super().__init__()
        check_integer_at_least("window", window, 1)
        self.window = window
        self.register_buffer("steps", torch.zeros((), dtype=torch.int64))
        for name in ("trimmed", "non_finite"):
            self.register_buffer(name, torch.zeros(num_workers, dtype=torch.int64))
        # trimmed, non-finite, distance, norm, whether the rule tells who is trimmed, unlikely, and outvoted
        self.register_buffer("_history", torch.full((window, 7, num_workers), torch.nan, dtype=torch.float64))

    def update(self, report: Report) -> None:
        """Take one step's report into account."""
        row = self._history[int(self.steps) % self.window]
        row[0], row[1] = report.trimmed, ~report.measurable
        row[2], row[3] = _relative(report.distances), _relative(report.norms)
        row[4] = ~report.weights.isnan()
        for place, odd in enumerate((report.unlikely, report.outvoted), start=5):
            row[place] = torch.zeros(row.shape[1]) if odd is None else odd
        self.trimmed += report.trimmed
        self.non_finite += ~report.measurable
        self.steps += 1

    def latest(self) -> tuple[Tensor, Tensor]:
        """Return the distances and the norms of the last step, [m] each, as multiples of the median worker's."""
        row = self._history[(int(self.steps) - 1) % self.window]
        return row[2], row[3]

    def trimmed_part(self) -> Tensor:
        """Return in which part of the last steps each worker had no part in the aggregate, [m]."""
        return self._recent()[:, 0].mean(0)

    def of(self, worker: int) -> dict[str, Any]:
        """Return what a :class:`Suspect` has to say of the last steps."""
        recent = self._recent()[:, :, worker]
        return {
            "steps": len(recent),
            "trimmed": int(recent[:, 0].sum()) if self._recent()[:, 4].any() else None,
            "non_finite": int(recent[:, 1].sum()),
            "distance": _known_median(recent[:, 2]),
            "norm": _known_median(recent[:, 3]),
            "unlikely": int(recent[:, 5].sum()),
            "outvoted": int(recent[:, 6].sum()),
        }

    def _recent(self) -> Tensor:
        return self._history[: min(int(self.steps), self.window)]


def _relative(values: Tensor) -> Tensor:
    """Return multiples of the median of those that are known; the others, and all where that is 0, are NaN."""
    median = values.nanmedian()
    return values / torch.where(median > 0, median, torch.nan)


def _known_median(values: Tensor) -> float | None:
    median = float(values.nanmedian())
    return None if median != median else median
