"""The optimizer of double momentum, a wrapper around another optimizer."""

import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Literal

import torch
from torch import Tensor
from torch.optim import LBFGS, Optimizer, SparseAdam

from lightning_byzantine.estimators.double_momentum_estimator import DoubleMomentumEstimator
from lightning_byzantine.optim.swapping import swapped
from lightning_byzantine.utilities.rng import replayed_rng

__all__ = ["DoubleMomentum"]

_KEY = "double_momentum"


class DoubleMomentum(Optimizer):
    """Evaluates gradients at an average x of the base optimizer's iterates w, and corrects them with earlier ones.

    ::

        d_t     = g_t + (1 - beta_t) (d_{t-1} - g~_t)       g_t = grad f(x_t; z_t),  g~_t = grad f(x_{t-1}; z_t)
        w_{t+1} = the base optimizer's step from w_t with the gradient alpha_t d_t, then projected if there is a radius
        x_{t+1} = (1 - gamma_t) x_t + gamma_t w_{t+1}

    Outside of :meth:`step`, parameters hold x: in training, validation and checkpoints. Under
    :class:`~lightning_byzantine.ByzantineDDPStrategy`, every worker sends its d_t, and w moves by the aggregate of all
    of them; elsewhere, :meth:`step` needs a closure, which it calls at both points with the same random numbers.

    With a radius, w and so x, an average of points of a convex set, stay in a ball, for learning rates that would be
    too large without it. Parameters are moved into it at once.

    Keeps two copies of the parameters, w and x_{t-1}, besides d and the base optimizer's own state, and with
    ``center="start"`` a third. A parameter without a gradient does not move. ``SGD(weight_decay=...)`` pulls w to 0; to
    pull x, add the penalty to the loss.

    Args:
        base: an optimizer whose ``step()`` takes one gradient, not LBFGS. Its parameters must be float32 or float64, or
            complex numbers of these.
        beta: a constant in (0, 1] for beta_t; None for 1 / t.
        gamma: a constant in (0, 1] for gamma_t; None for 2 / (t + 2).
        min_beta: lower bound of the scheduled beta_t, in [0, 1].
        min_gamma: lower bound of the scheduled gamma_t, in [0, 1].
        weighted: whether the gradient is multiplied by alpha_t = t.
        schedule: "paper" as above; "code" for round(1 / t, 3) and round(2 / (t + 1), 3), as in the paper's public code,
            which also has ``min_beta=0.01, min_gamma=0.01, weighted=False``.
        radius: of the ball that iterates are projected onto after every step; None for no projection.
        center: of the ball, "origin" or "start", the parameters' values before the first step.
        per_tensor: whether each parameter tensor has a ball of its own; otherwise, there is one for the vector of all
            parameters that have had a gradient.

    Attributes:
        base: the wrapped optimizer; both have the same ``param_groups``.
        estimator: keeps d, and the t of beta_t.
        receives_estimates: whether gradients are aggregated estimates already, so that the closure is called once; set
            by ``ByzantineDDPStrategy``.

    Raises:
        TypeError: if ``base`` is not an optimizer or can't be wrapped, or a parameter is in half precision.
        ValueError: if a factor is out of its bounds.

    Source: Levy, "mu^2-SGD: Stable Stochastic Optimization via a Double Momentum Mechanism" (arXiv 2304.04172).

    Example:
        >>> point = torch.nn.Parameter(torch.tensor([1.0]))
        >>> optimizer = DoubleMomentum(torch.optim.SGD([point], lr=0.1))
        >>> def closure():
        ...     optimizer.zero_grad()
        ...     loss = point.square().sum()
        ...     loss.backward()
        ...     return loss
        >>> for _ in range(20):
        ...     loss = optimizer.step(closure)
        >>> loss < 0.01
        tensor(True)

    """

    def __init__(
        self,
        base: Optimizer,
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
        if not isinstance(base, Optimizer):
            raise TypeError(f"base must be a torch.optim.Optimizer, such as SGD(model.parameters()), got {base!r}")
        if isinstance(base, DoubleMomentum | LBFGS | SparseAdam):
            raise TypeError(f"base must take one dense gradient a step, which {type(base).__name__} does not")
        _check_dtypes(base.param_groups)
        self.base = base
        self.estimator = DoubleMomentumEstimator(
            beta, gamma, min_beta, min_gamma, weighted, schedule, radius, center, per_tensor
        )
        self.receives_estimates = False
        # Not the estimator's step, which can restart at 1 while w and x continue.
        self._step = 1
        super().__init__(base.param_groups, base.defaults)
        self.param_groups = base.param_groups
        self._move_inside()

    @classmethod
    def around(cls, base: Optimizer, estimator: DoubleMomentumEstimator) -> "DoubleMomentum":
        """Wrap ``base`` with an existing estimator."""
        optimizer = cls(base, **estimator.arguments())
        optimizer.estimator = estimator
        return optimizer

    def __getstate__(self) -> dict[str, Any]:
        """Return the state for pickling and copying; as with other optimizers, hooks are not part of it."""
        own = {name: self.__dict__[name] for name in ("base", "estimator", "receives_estimates", "_step")}
        return super().__getstate__() | own

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group to the base optimizer, which shares its groups with this one."""
        if any(param_group is group for group in self.base.param_groups):
            super().add_param_group(param_group)  # called by the constructor for the groups that the base has already
        else:
            parameters = param_group["params"]
            param_group["params"] = [parameters] if isinstance(parameters, Tensor) else list(parameters)
            _check_dtypes([param_group])
            self.base.add_param_group(param_group)
            self._move_inside()

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Take one step; does nothing if no parameter has a gradient.

        Args:
            closure: clears the gradients, computes the loss and its gradients, and returns the loss. It is called at
                both points, or once if :attr:`receives_estimates`. May be None in the first step.

        Returns:
            the result of the closure at x_t.

        Raises:
            RuntimeError: from t = 2 on, if there is no closure to compute the gradient at the previous query point.

        """
        if self.receives_estimates:
            loss = _call(closure)
            if not self.estimator.aggregated:
                return loss
            estimates = [(parameter, parameter.grad) for parameter in self._parameters() if parameter.grad is not None]
        else:
            loss = self._evaluate(closure)
            estimates = self._own_estimates()
        if estimates:
            self._move(estimates)
            self.estimator.advance()
        else:
            self.estimator.begin()
        return loss

    def take_back(self) -> None:
        """Undo :attr:`receives_estimates`: evaluate both points again, with a new estimator at t = 1."""
        self.receives_estimates = False
        self.estimator = DoubleMomentumEstimator(**self.estimator.arguments())

    @contextmanager
    def swapped_to_previous_point(self) -> Iterator[None]:
        """Let the parameters hold x_{t-1} within the block, which must contain both forward and backward."""
        moved = [parameter for parameter in self._parameters() if self.state.get(parameter)]
        # Autocast caches casts by parameter, and would use those of the other values.
        torch.clear_autocast_cache()
        try:
            with swapped(moved, "data", [self.state[parameter]["previous"] for parameter in moved]):
                yield
        finally:
            torch.clear_autocast_cache()

    def state_dict(self) -> dict[str, Any]:
        """Return the base's state, and in one more entry t, w, x_{t-1}, the start, and d unless a strategy keeps it."""
        moved = {name: self.state[parameter] for name, parameter in self._named() if self.state.get(parameter)}
        own: dict[str, Any] = {"step": self._step}
        own |= {key: {name: state[key] for name, state in moved.items()} for key in self._kept}
        if not self.receives_estimates:
            own["estimator"] = {"workers": [self.estimator.worker_state()], "shared": self.estimator.shared_state()}
        return self.base.state_dict() | {_KEY: own}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore what :meth:`state_dict` returned.

        Warns where something is missing and starts without it: all but the base optimizer's state if ``state_dict`` is
        of an optimizer that was not wrapped; d if it was saved under a strategy, which keeps one for each worker; the
        start, for which x is taken, if the ball was not around it.
        """
        self.base.load_state_dict(state_dict)
        self.param_groups = self.base.param_groups
        own = state_dict.get(_KEY, {"step": 1, "iterate": {}, "previous": {}})
        self._step = own["step"]
        self.state.clear()
        for name, parameter in self._named():
            if name in own["iterate"]:
                values = {key: own[key][name] if key in own else parameter.detach() for key in self._kept}
                self.state[parameter] = {key: value.to(parameter, copy=True) for key, value in values.items()}
        if _KEY not in state_dict:
            warnings.warn(
                f"The state is one of {type(self.base).__name__} that was not wrapped in DoubleMomentum, so double"
                " momentum starts at t = 1 from the current parameters.",
                stacklevel=2,
            )
        if own["iterate"] and not own.keys() >= set(self._kept):
            warnings.warn(
                "The state was saved without center='start', so the ball is around the current parameters.",
                stacklevel=2,
            )
        if self.receives_estimates:
            return
        if "estimator" in own:
            self.estimator.load_state(**own["estimator"])
        else:
            self.estimator.reset()
            if _KEY in state_dict:
                warnings.warn("The state was saved under a strategy, so the estimate d starts at t = 1.", stacklevel=2)

    def _evaluate(self, closure: Callable[[], Any] | None) -> Any:
        """Call the closure at x_{t-1} for g~_t, and then at x_t."""
        if closure is not None and _is_from_lightning(closure):
            raise RuntimeError(
                "DoubleMomentum got a closure of Lightning's Trainer, whose strategy does not evaluate gradients at the"
                " previous query point. Use `Trainer(strategy='byzantine_ddp')`, on any number of devices."
            )
        if closure is not None and self.estimator.step > 1:
            parameters = list(self._parameters())
            with swapped(parameters, "grad", [None] * len(parameters)):
                with replayed_rng(parameters[0].device), self.swapped_to_previous_point():
                    _call(closure)
                # Copies, because DDP writes all gradients into the same buffers.
                self.estimator.begin({name: p.grad.clone() for name, p in self._named() if p.grad is not None})
        return _call(closure)

    def _own_estimates(self) -> list[tuple[Tensor, Tensor]]:
        estimates, sent = [], {}
        for name, parameter in self._named():
            if parameter.grad is not None:
                sent[name] = torch.empty_like(parameter.grad)
                self.estimator.estimate(name, parameter.grad, out=sent[name])
                estimates.append((parameter, sent[name]))
        self.estimator.commit(sent)
        return estimates

    def _move(self, estimates: list[tuple[Tensor, Tensor]]) -> None:
        # w_{t+1} = base step from w_t with alpha_t d^_t;  x_{t+1} = (1 - gamma_t) x_t + gamma_t w_{t+1}
        alpha, gamma = self.estimator.schedule.alpha_at(self._step), self.estimator.schedule.gamma_at(self._step)
        parameters = [parameter for parameter, _ in estimates]
        for parameter in parameters:
            if not self.state[parameter]:
                self.state[parameter] = {key: parameter.clone() for key in self._kept}
        iterates = [self.state[parameter]["iterate"] for parameter in parameters]
        gradients = [estimate if alpha == 1 else estimate * alpha for _, estimate in estimates]
        with swapped(parameters, "data", iterates), swapped(parameters, "grad", gradients):
            self.base.step()
        self._project(parameters)
        # Also for parameters that do not move in this step.
        for parameter, state in self.state.items():
            state["previous"].copy_(parameter)
        for parameter, iterate in zip(parameters, iterates, strict=True):
            parameter.data.lerp_(iterate, gamma)
        self._step += 1

    @property
    def _kept(self) -> tuple[str, ...]:
        """Names of what the state of each parameter consists of."""
        ball = self.estimator.ball
        return (
            ("iterate", "previous", "start") if ball is not None and ball.center == "start" else ("iterate", "previous")
        )

    def _project(self, moved: list[Tensor]) -> None:
        ball = self.estimator.ball
        if ball is not None:
            states = [self.state[parameter] for parameter in moved] if ball.per_tensor else list(self.state.values())
            iterates = [state["iterate"] for state in states]
            ball.project(iterates, [state["start"] for state in states] if "start" in self._kept else iterates)

    def _move_inside(self) -> None:
        """Project the parameters: the convex combinations x begin with them."""
        ball = self.estimator.ball
        if ball is not None and ball.center == "origin":
            points = [parameter.data for parameter in self._parameters()]
            ball.project(points, points)

    def _parameters(self) -> Iterator[Tensor]:
        return (parameter for group in self.param_groups for parameter in group["params"])

    def _named(self) -> Iterator[tuple[str, Tensor]]:
        return ((str(index), parameter) for index, parameter in enumerate(self._parameters()))


def _check_dtypes(param_groups: list[dict[str, Any]]) -> None:
    for group in param_groups:
        for named in group["params"]:
            parameter = named[1] if isinstance(named, tuple) else named
            if parameter.dtype.to_real() not in (torch.float32, torch.float64):
                raise TypeError(
                    f"DoubleMomentum needs parameters of float32 or float64, got {parameter.dtype}, in which its small"
                    " steps are lost to rounding. With Lightning, use precision='bf16-mixed' or '16-mixed'."
                )


def _call(closure: Callable[[], Any] | None) -> Any:
    if closure is None:
        return None
    with torch.enable_grad():
        return closure()


def _is_from_lightning(closure: Callable[[], Any]) -> bool:
    function = getattr(closure, "func", closure)
    return str(getattr(function, "__module__", "")).startswith(("lightning.", "pytorch_lightning."))
