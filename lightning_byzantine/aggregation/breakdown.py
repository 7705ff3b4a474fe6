"""What is done when more workers are provably bad than the rule withstands."""

from typing import Literal

from lightning_byzantine.utilities.checks import check_choice, check_integer_at_least

__all__ = ["Breakdown"]


class Breakdown:
    """One policy for steps whose aggregation broke down, the same on every rank.

    Args:
        policy: "raise" ends the run, "skip" leaves out the optimizer's step, "propagate" takes the plain mean, as stock
            DDP does.
        max_skips: how many steps in a row "skip" may leave out; one more raises.

    Attributes:
        skipped: how many steps were left out in the whole run.

    Raises:
        ValueError: if the policy is unknown, or ``max_skips`` below 1.

    Example:
        >>> breakdown = Breakdown("skip", max_skips=1)
        >>> breakdown.skips(), breakdown.skips(), breakdown.skipped
        (True, False, 1)

    """

    def __init__(self, policy: Literal["raise", "skip", "propagate"] = "raise", max_skips: int = 10) -> None:
        check_choice("on_breakdown", policy, ("raise", "skip", "propagate"))
        check_integer_at_least("max_skips", max_skips, 1)
        self.max_skips = max_skips
        self.skipped = 0
        self._policy = policy
        self._in_a_row = 0

    @property
    def propagates(self) -> bool:
        """Whether the plain mean takes the place of the aggregate."""
        return self._policy == "propagate"

    def skips(self) -> bool:
        """Count a step that broke down, and tell whether the run goes on without it."""
        if self._policy != "skip" or self._in_a_row == self.max_skips:
            return False
        self.skipped += 1
        self._in_a_row += 1
        return True

    def succeeded(self) -> None:
        """Begin to count skips in a row anew: a step was aggregated."""
        self._in_a_row = 0
