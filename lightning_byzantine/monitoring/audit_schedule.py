"""When to audit."""

from collections.abc import Sequence
from typing import Any, Literal, get_args

from lightning_byzantine.utilities.checks import check_choice, check_integer_at_least

__all__ = ["AuditSchedule", "Audited"]

Audited = Literal["all", "suspects", "turns"]
# The first round must not cost more than later ones by much.
_AT_LEAST_APART = 50


class AuditSchedule:
    """Decides in which step which worker's audit is announced.

    Suspects are audited as they appear. Also, workers take turns, suspected or not: every ``every_n_steps`` steps, and
    in the first round so often that each has been audited once after that many steps, though not more often than every
    50 steps. So a fault that nobody sees in statistics, such as a flipped bit of little weight in each step, is found
    as well.

    Args:
        audited: "all" for both, "suspects" or "turns" for one of them; None for no audits.
        every_n_steps: number of steps between two turns.

    Raises:
        ValueError: if ``audited`` is unknown or ``every_n_steps`` below 1.

    Example:
        >>> schedule, num_audits = AuditSchedule("turns", every_n_steps=300), [0, 0]
        >>> for step in range(1, 900):
        ...     order = sorted([0, 1], key=lambda worker: num_audits[worker])
        ...     for worker in schedule.announced(step, suspects=[], order=order, num_audits=num_audits):
        ...         print(f"step {step}: worker {worker}")
        ...         num_audits[worker] += 1
        step 100: worker 0
        step 200: worker 1
        step 500: worker 0
        step 800: worker 1

    """

    def __init__(self, audited: Audited | None, every_n_steps: int = 500) -> None:
        self._audited = None if audited is None else check_choice("audit", audited, get_args(Audited))
        self._every_n_steps = check_integer_at_least("audit_every_n_steps", every_n_steps, 1)
        self._last_turn = 0

    def announced(
        self, step: int, suspects: Sequence[int], order: Sequence[int], num_audits: Sequence[int]
    ) -> list[int]:
        """Return the workers whose audits are announced after a step.

        Args:
            step: number of steps of the run so far.
            suspects: indices of those that have come under suspicion in this step.
            order: indices of those that need an audit, the first one first.
            num_audits: [m], of each worker so far.

        """
        workers = list(suspects) if self._audited in ("all", "suspects") else []
        if self._audited in ("all", "turns") and order and step - self._last_turn >= self._distance(order, num_audits):
            self._last_turn = step
            workers.append(order[0])
        return workers

    def _distance(self, order: Sequence[int], num_audits: Sequence[int]) -> int:
        if all(num_audits[worker] > 0 for worker in order):
            return self._every_n_steps
        # So that there is some time left after the last one.
        return min(self._every_n_steps, max(_AT_LEAST_APART, self._every_n_steps // (len(num_audits) + 1)))

    def state_dict(self) -> dict[str, Any]:
        """Return everything that changes."""
        return {"last_turn": self._last_turn}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore what :meth:`state_dict` returned."""
        self._last_turn = state["last_turn"]
