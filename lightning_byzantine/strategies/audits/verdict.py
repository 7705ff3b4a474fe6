"""The outcome of an audit."""

from dataclasses import dataclass
from enum import StrEnum

__all__ = ["Outcome", "Verdict"]


class Outcome(StrEnum):
    """What an audit can find."""

    WRONGLY = "computes wrongly"
    RIGHTLY = "computes rightly"
    INCONCLUSIVE = "inconclusive"


@dataclass(frozen=True)
class Verdict:
    """The outcome of one worker's audit, the same on every rank.

    Args:
        worker: its index.
        step: the Trainer's ``global_step`` of the audit.
        outcome: "computes wrongly" is a proof: more than f auditors, so an honest one among them, found that what the
            worker sent is not what its batch leads to. "computes rightly": more than f found that it is; if the
            worker differs from others, then by its data.
        reason: why an audit is inconclusive; empty otherwise.
        wrong: number of auditors that say "wrong".
        right: number of auditors that say "right".
        residual: distance of what was sent from what the batch leads to, in units of the gradient's part in it; the
            middle auditor's, nan if none could compute it.
        tolerance: the middle auditor's bound on the residual.

    Example:
        >>> print(Verdict(3, 41, Outcome.WRONGLY, "", wrong=4, right=0, residual=2.0, tolerance=3.5e-4))
        worker 3 computes wrongly: 4 auditors say wrong and 0 right at step 41 (residual 2, tolerance 0.00035)

    """

    worker: int
    step: int
    outcome: Outcome
    reason: str
    wrong: int
    right: int
    residual: float
    tolerance: float

    def __str__(self) -> str:
        """Return one line."""
        if self.outcome == Outcome.INCONCLUSIVE:
            return f"the audit of worker {self.worker} at step {self.step} is inconclusive: {self.reason}"
        return (
            f"worker {self.worker} {self.outcome}: {self.wrong} auditors say wrong and {self.right} right at step"
            f" {self.step} (residual {self.residual:.3g}, tolerance {self.tolerance:.2g})"
        )
