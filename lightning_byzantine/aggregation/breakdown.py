"""What is done when more workers are provably bad than the rule withstands."""

from collections.abc import Callable, Iterable
from typing import Any, Literal

from lightning.pytorch.utilities import rank_zero_warn
from torch.optim import Optimizer

from lightning_byzantine.errors import ByzantineBreakdownError
from lightning_byzantine.utilities.checks import check_integer_at_least

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

    """

    def __init__(self, policy: Literal["raise", "skip", "propagate"] = "raise", max_skips: int = 10) -> None:
        if policy not in ("raise", "skip", "propagate"):
            raise ValueError(f"on_breakdown must be 'raise', 'skip' or 'propagate', got {policy!r}")
        check_integer_at_least("max_skips", max_skips, 1)
        self.policy = policy
        self.max_skips = max_skips
        self.skipped = 0
        self._in_a_row = 0
        self._to_skip: set[int] = set()

    def tolerates(self, error: ByzantineBreakdownError, optimizers: Iterable[Optimizer]) -> bool:
        """Tell whether the run goes on, without the next step of each of these optimizers.

        Each of them, since with several nobody knows here which gradients belong to whose next step.
        """
        if self.policy != "skip" or self._in_a_row == self.max_skips:
            return False
        self.skipped += 1
        self._in_a_row += 1
        self._to_skip = {id(optimizer) for optimizer in optimizers}
        rank_zero_warn(
            f"{error}. Skipped the optimizer's step, the {self.skipped}th in this run; the run ends after"
            f" {self.max_skips} in a row (`max_skips`)."
        )
        return True

    def succeeded(self) -> None:
        """Begin to count skips in a row anew: a step was aggregated."""
        self._in_a_row = 0

    def step(self, optimizer: Optimizer, step: Callable[[Callable[[], Any]], Any], closure: Callable[[], Any]) -> Any:
        """Take an optimizer's step, unless the aggregation broke down, in its closure or before.

        Args:
            optimizer: whose step it is.
            step: takes the step, given a closure.
            closure: computes the gradients, and returns the loss.

        """

        def guarded() -> Any:
            loss = closure()
            if id(optimizer) in self._to_skip:
                self._to_skip.remove(id(optimizer))
                raise _LeaveOutError(loss)
            return loss

        try:
            return step(guarded)
        except _LeaveOutError as leave_out:
            return leave_out.loss


class _LeaveOutError(Exception):
    """Leaves an optimizer's step after the closure and before anything has moved: neither parameters nor state."""

    def __init__(self, loss: Any) -> None:
        super().__init__()
        self.loss = loss
