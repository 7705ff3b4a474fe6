"""The estimator of double momentum."""

from collections.abc import Mapping
from dataclasses import fields
from typing import Any, Literal

import torch
from torch import Tensor

from lightning_byzantine.estimators.ball import ball_of
from lightning_byzantine.estimators.estimator import Estimator
from lightning_byzantine.estimators.schedule import Schedule

__all__ = ["DoubleMomentumEstimator"]


class DoubleMomentumEstimator(Estimator):
    """Each worker sends its gradient corrected by its previous estimate; the noise shrinks from step to step.

    ::

        g_t  = grad f(x_t; z_t)             the ordinary gradient
        g~_t = grad f(x_{t-1}; z_t)         on the same batch, at the previous query point
        d_t  = g_t + (1 - beta_t) (d_{t-1} - g~_t)          d_1 = g_1

    Because x_t is near x_{t-1}, the noise of g_t and g~_t is nearly the same, and cancels.
    ``ByzantineDDPStrategy(estimator=...)`` also wraps the module's optimizer in
    :class:`~lightning_byzantine.optim.DoubleMomentum`, which takes and counts the steps.

    :meth:`commit` only holds d_t until :meth:`advance`, after the optimizer step, makes it the worker's state: a
    gradient scaler may skip that step. In between, ``sent`` must not be overwritten.

    Costs a second forward and backward pass per step and, per worker, one parameter-sized buffer for d, and another for
    g~ during a step.

    Args:
        beta: a constant in (0, 1] for beta_t; None for 1 / t.
        gamma: a constant in (0, 1] for gamma_t; None for 2 / (t + 2).
        min_beta: floor of the scheduled beta_t, in [0, 1].
        min_gamma: floor of the scheduled gamma_t, in [0, 1].
        weighted: whether the gradient is multiplied by alpha_t = t.
        schedule: "paper" as above; "code" for round(1 / t, 3) and round(2 / (t + 1), 3), as in the paper's public code.
        radius: of the balls that the optimizer's iterates are projected onto; None for no projection.
        center: of the balls, "origin" or "start", the parameters' values before the first step.
        per_tensor: whether each parameter tensor has a ball of its own; otherwise, there is one for the vector of all.

    Attributes:
        step: the next t, which also counts steps that excluded this worker's estimate.
        schedule: the factors.
        ball: what iterates are projected onto; None for no projection.
        aggregated: whether there was an aggregate since the last step.

    Source: Levy, "mu^2-SGD: Stable Stochastic Optimization via a Double Momentum Mechanism" (arXiv 2304.04172); Dahan &
    Levy, ICML 2024 (arXiv 2405.14759).

    Example:
        >>> estimator, sent = DoubleMomentumEstimator(beta=0.5), torch.empty(1)
        >>> estimator.estimate("weight", torch.tensor([2.0]), out=sent)
        >>> estimator.commit({"weight": sent})
        >>> estimator.advance()
        >>> estimator.begin({"weight": torch.tensor([1.0])})
        >>> estimator.estimate("weight", torch.tensor([3.0]), out=sent)
        >>> estimator.commit({"weight": sent})
        >>> estimator.advance()
        >>> estimator.worker_state()
        {'weight': tensor([3.5000])}

    """

    transparent = False

    def __init__(
        self,
        beta: float | None = None,
        gamma: float | None = None,
        min_beta: float = 0.0,
        min_gamma: float = 0.0,
        weighted: bool = True,
        schedule: Literal["paper", "code"] = "paper",
        radius: float | None = None,
        center: Literal["origin", "start"] = "origin",
        per_tensor: bool = True,
    ) -> None:
        super().__init__()
        self.schedule = Schedule(beta, gamma, min_beta, min_gamma, weighted, schedule)
        self.ball = ball_of(radius, center, per_tensor)
        self.reset()

    def __repr__(self) -> str:
        """Show the arguments that are not at their defaults."""
        given = ", ".join(f"{name}={value!r}" for name, value in self.arguments().items())
        return f"{type(self).__name__}({given})"

    def arguments(self) -> dict[str, Any]:
        """Return the arguments that are not at their defaults, for another estimator like this one."""
        parts = [part for part in (self.schedule, self.ball) if part is not None]
        pairs = [(field, getattr(part, field.name)) for part in parts for field in fields(part)]
        return {field.name: value for field, value in pairs if value != field.default}

    @property
    def memory(self) -> float:
        """Return 1 - beta_t."""
        return 1 - self.schedule.beta_at(self.step)

    def reset(self) -> None:
        """Clear all estimates, and set t = 1."""
        super().reset()
        self.step = 1
        self._accepted: dict[int, Mapping[str, Tensor]] = {}
        self.begin()

    def begin(self, *previous: dict[str, Tensor]) -> None:
        """Begin a step, and discard one that the optimizer has skipped.

        Args:
            *previous: for each worker, g~_t as [n] by parameter name; empty at t = 1. Parameters that have no gradient
                may be missing. Left out where it is not known yet.

        """
        self._previous = previous
        self._accepted.clear()
        self.aggregated = False

    def estimate(self, name: str, gradient: Tensor, out: Tensor, worker: int = 0) -> None:
        """Write d_t into ``out``."""
        if self.step > 1 and not self._previous:
            raise RuntimeError(
                "Double momentum needs the gradient at the previous query point from its second step on, got none. Use"
                " `Trainer(strategy='byzantine_ddp')`, which computes it, or give `DoubleMomentum.step` a closure."
            )
        previous = self._previous[worker].get(name) if self._previous else None
        self.follow(self._estimates[worker].get(name), gradient, previous, out)

    def follow(self, last: Tensor | None, gradient: Tensor, previous: Tensor | None, out: Tensor) -> None:
        """Write d_t into ``out``, given d_{t-1}."""
        _correct(last, gradient, previous, self.schedule.beta_at(self.step), out)

    def commit(self, sent: Mapping[str, Tensor], worker: int = 0) -> None:
        """Hold d_t until :meth:`advance`."""
        self._accepted[worker] = sent

    def gradient(self, name: str, aggregate: Tensor, out: Tensor) -> None:
        """Write d^_t into ``out``, for the optimizer."""
        self.aggregated = True
        out.copy_(aggregate)

    def advance(self) -> None:
        """Make d_t every worker's state, after the optimizer step."""
        for worker, sent in self._accepted.items():
            super().commit(sent, worker)
        self.step += 1
        self.begin()

    def to(self, device: torch.device) -> None:
        """Move all state to a device, and discard an unfinished step."""
        super().to(device)
        self.begin()

    def shared_state(self) -> dict[str, Tensor]:
        """Return the next t."""
        return {"step": torch.tensor(self.step)}

    def load_shared_state(self, state: Mapping[str, Tensor]) -> None:
        """Restore the next t."""
        self.step = int(state["step"])


def _correct(estimate: Tensor | None, gradient: Tensor, previous: Tensor | None, beta: float, out: Tensor) -> None:
    # d_t = g_t + (1 - beta_t) (d_{t-1} - g~_t); an unused parameter's g~_t is 0
    if estimate is None:
        out.copy_(gradient)
        return
    out.copy_(estimate)
    if previous is not None:
        out.sub_(previous)
    out.mul_(1 - beta).add_(gradient)
