"""The policy for steps in which more than ``num_byzantine`` workers send unusable vectors."""

from typing import Literal

from lightning_byzantine.utilities.checks import check_choice, check_integer_at_least

__all__ = ["Breakdown"]


class Breakdown:
    """The policy for steps in which more workers than f send unusable vectors, the same on every rank.

    Args:
        policy: "raise" ends the run, "skip" skips the optimizer step, "propagate" uses the plain mean, as stock DDP
            does.
        max_skips: maximum number of consecutive skipped steps; one more raises.

    Attributes:
        skipped: number of skipped steps in the whole run.

    Raises:
        ValueError: if the policy is unknown, or ``max_skips`` below 1.

    Example:
        >>> breakdown = Breakdown("skip", max_skips=1)
        >>> breakdown.skips(), breakdown.skips(), breakdown.skipped
        (True, False, 1)

    """

    def __init__(self, policy: Literal["raise", "skip", "propagate"] = "raise", max_skips: int = 10) -> None:
        self.max_skips = check_integer_at_least("max_skips", max_skips, 1)
        self.skipped = 0
        self._policy = check_choice("on_breakdown", policy, ("raise", "skip", "propagate"))
        self._in_a_row = 0

    @property
    def propagates(self) -> bool:
        """Whether the plain mean replaces the aggregate."""
        return self._policy == "propagate"

    def skips(self) -> bool:
        """Count a step without a result, and return whether to skip it and continue."""
        if self._policy != "skip" or self._in_a_row == self.max_skips:
            return False
        self.skipped += 1
        self._in_a_row += 1
        return True

    def succeeded(self) -> None:
        """Reset the count of consecutive skips, after a step was aggregated."""
        self._in_a_row = 0
