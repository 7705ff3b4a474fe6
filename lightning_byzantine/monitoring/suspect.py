"""One worker, and what speaks against it."""

from dataclasses import asdict, dataclass
from typing import Any

from lightning_byzantine.monitoring.proofs import Proof

__all__ = ["Suspect"]


@dataclass(frozen=True)
class Suspect:
    """A worker under suspicion, or proved to be faulty, with the evidence of the last steps.

    Args:
        worker: its index.
        rank: the process that acts as this worker, or the first of those that are this worker together.
        host: the process's host; several are separated by commas.
        device: its device, likewise.
        steps: number of steps that the evidence is from.
        trimmed: number of these in which it did not contribute to the aggregate, where a step in which it did to some
            columns only counts by the fraction of the others; None if unknown.
        non_finite: number of steps in which its row was not finite, or too large to be measured.
        distance: median over the steps of its distance as a multiple of the median worker's; None if unknown.
        norm: likewise, of its norm.
        opposed: number of steps in which it pointed away from the others.
        outvoted: number of steps in which its process reported a non-finite buffer or metric, unlike most.
        shadow: whether the strategy was in shadow mode, so that nothing was trimmed.
        equivocated: number of steps in which its process was proved to have told ranks different things.
        proof: what proves that it is faulty, see :class:`~lightning_byzantine.monitoring.proofs.Proofs`; None while
            there is no proof, and it may be an honest worker with unusual data, or one that liars stay away from.
        verdict: outcome of its last audit; None if there was none.
        num_ranks: number of processes, of neighbouring ranks, that are this worker together.

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
    trimmed: float | None
    non_finite: int
    distance: float | None
    norm: float | None
    opposed: int
    outvoted: int
    shadow: bool
    equivocated: int = 0
    proof: Proof | None = None
    verdict: str | None = None
    num_ranks: int = 1

    @property
    def ranks(self) -> str:
        """The ranks in words, such as "3" or "6-7"."""
        return f"{self.rank}-{self.rank + self.num_ranks - 1}" if self.num_ranks > 1 else str(self.rank)

    def __str__(self) -> str:
        """Return one line: the worker, where it runs, and the evidence."""
        parts = [*self._known(), *self._counted()]
        if self.distance is not None:
            parts.append(f"distance {self.distance:.3g} x the median")
        if self.norm is not None:
            parts.append(f"norm {self.norm:.3g} x the median")
        ranks = f"rank{'s' * (self.num_ranks > 1)} {self.ranks}"
        return f"worker {self.worker} ({ranks}, host {self.host}, {self.device}): {', '.join(parts)}"

    def _known(self) -> list[str]:
        """Return what is known for certain."""
        proof = [] if self.proof is None else [f"proved: {self.proof}"]
        return proof if self.verdict in (None, self.proof) else [*proof, f"audit: {self.verdict}"]

    def _counted(self) -> list[str]:
        """Return what it did in some of the last steps that honest workers rarely do."""
        counts = [] if self.trimmed is None else [f"{'would have been ' * self.shadow}trimmed in {self.trimmed:g}"]
        rare = {
            "non-finite in": self.non_finite,
            "pointed the other way in": self.opposed,
            "non-finite buffers or metrics in": self.outvoted,
            "told ranks different things in": self.equivocated,
        }
        counts += [f"{what} {number}" for what, number in rare.items() if number > 0]
        return [f"{count} of the last {self.steps} steps" for count in counts]

    def as_dict(self) -> dict[str, Any]:
        """Return all fields by name, ready for JSON."""
        return asdict(self)
