"""Schedules of double momentum's factors."""

from dataclasses import dataclass
from typing import Literal

from lightning_byzantine.utilities.checks import check_number

__all__ = ["Schedule"]


@dataclass(frozen=True)
class Schedule:
    """The factors of step t = 1, 2, ...: beta_t of the gradient's correction, alpha_t and gamma_t of the averaging.

    ::

                  schedule="paper"                        schedule="code"
        beta_t    max(1 / t, min_beta)                    max(round(1 / t, 3), min_beta)
        gamma_t   max(2 / (t + 2), min_gamma)             max(round(2 / (t + 1), 3), min_gamma)
        alpha_t   t, or 1 if not weighted                 the same

    Args:
        beta: a constant in (0, 1] for beta_t; None for the schedule.
        gamma: a constant in (0, 1] for gamma_t; None for the schedule.
        min_beta: floor of the scheduled beta_t, in [0, 1].
        min_gamma: floor of the scheduled gamma_t, in [0, 1].
        weighted: whether alpha_t = t.
        schedule: "paper" for the formulas of the paper, "code" for those of its public code.

    Raises:
        TypeError: if a factor is not a number, or ``weighted`` not a bool.
        ValueError: if one is out of its bounds, a floor comes with a constant, or the schedule is unknown.

    Example:
        >>> Schedule().beta_at(4), Schedule().gamma_at(4), Schedule().alpha_at(4)
        (0.25, 0.3333333333333333, 4.0)
        >>> Schedule(schedule="code", min_beta=0.01).beta_at(3)
        0.333

    """

    beta: float | None = None
    gamma: float | None = None
    min_beta: float = 0.0
    min_gamma: float = 0.0
    weighted: bool = True
    schedule: Literal["paper", "code"] = "paper"

    def __post_init__(self) -> None:
        """Check the arguments."""
        for name in ("beta", "gamma"):
            constant, floor = getattr(self, name), getattr(self, f"min_{name}")
            if not 0 <= check_number(f"min_{name}", floor) <= 1:
                raise ValueError(f"min_{name} must satisfy 0 <= min_{name} <= 1, got {floor}")
            if constant is None:
                continue
            if not 0 < check_number(name, constant) <= 1:
                raise ValueError(f"{name} must satisfy 0 < {name} <= 1, got {constant}")
            if floor:
                raise ValueError(
                    f"min_{name} is the floor of the scheduled {name}, so it must be 0 with a constant one, got"
                    f" {name}={constant} and min_{name}={floor}"
                )
        if not isinstance(self.weighted, bool):
            raise TypeError(f"weighted must be a bool, got {self.weighted!r}")
        if self.schedule not in ("paper", "code"):
            raise ValueError(f"schedule must be 'paper' or 'code', got {self.schedule!r}")

    @property
    def lowest_beta(self) -> float:
        """The limit of beta_t."""
        return self.min_beta if self.beta is None else self.beta

    def beta_at(self, step: int) -> float:
        """Return beta_t, the weight of the new gradient."""
        if self.beta is not None:
            return self.beta
        return max(1 / step if self.schedule == "paper" else round(1 / step, 3), self.min_beta)

    def gamma_at(self, step: int) -> float:
        """Return gamma_t, the weight of the iterate in the next query point."""
        if self.gamma is not None:
            return self.gamma
        return max(2 / (step + 2) if self.schedule == "paper" else round(2 / (step + 1), 3), self.min_gamma)

    def alpha_at(self, step: int) -> float:
        """Return alpha_t, the factor on the gradient."""
        return float(step) if self.weighted else 1.0
