"""The optimizer of double momentum, around one of the user's own."""

import warnings
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from typing import Any, Literal

import torch
from torch import Tensor
from torch.optim import LBFGS, Optimizer, SparseAdam

from lightning_byzantine.estimators.double_momentum_estimator import DoubleMomentumEstimator
from lightning_byzantine.utilities.rng import replayed_rng

__all__ = ["DoubleMomentum"]

_KEY = "double_momentum"


class DoubleMomentum(Optimizer):
    """Evaluates gradients at an average x of the base optimizer's iterates w, and corrects them by earlier ones.

    ::

        d_t     = g_t + (1 - beta_t) (d_{t-1} - g~_t)       g_t = grad f(x_t; z_t),  g~_t = grad f(x_{t-1}; z_t)
        w_{t+1} = the base optimizer's step from w_t with the gradient alpha_t d_t
        x_{t+1} = (1 - gamma_t) x_t + gamma_t w_{t+1}

    Parameters hold x outside of :meth:`step`: in training, validation and checkpoints alike. Under
    :class:`~lightning_byzantine.ByzantineDDPStrategy`, every worker sends its d_t, and w moves by what the rule makes
    of them; elsewhere, :meth:`step` needs a closure, which it calls at both points with the same random numbers.

    Keeps two copies of the parameters, w and x_{t-1}, beside d and the base optimizer's own state. A parameter without
    a gradient is left alone. ``SGD(weight_decay=...)`` pulls w to 0; add the penalty to the loss to pull x, as the
    paper's public code does.

    Args:
        base: an optimizer whose ``step()`` takes one gradient, not LBFGS. Its parameters must be float32 or float64.
        beta: a constant in (0, 1] for beta_t; None for 1 / t.
        gamma: a constant in (0, 1] for gamma_t; None for 2 / (t + 2).
        min_beta: floor of the scheduled beta_t, in [0, 1].
        min_gamma: floor of the scheduled gamma_t, in [0, 1].
        weighted: whether the gradient is multiplied by alpha_t = t.
        schedule: "paper" as above; "code" for round(1 / t, 3) and round(2 / (t + 1), 3), as in the paper's public code,
            which also has ``min_beta=0.01, min_gamma=0.01, weighted=False``.

    Attributes:
        base: the wrapped optimizer; both have the same ``param_groups``.
        estimator: keeps d, and beta's step.
        receives_estimates: whether gradients arrive as aggregated estimates, and the closure takes care of both points;
            set by ``ByzantineDDPStrategy``.

    Raises:
        TypeError: if ``base`` is no optimizer, or of a kind that can't be wrapped, or a parameter is in half precision.
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
    ) -> None:
        _check_base(base)
        self.base = base
        self.estimator = DoubleMomentumEstimator(beta, gamma, min_beta, min_gamma, weighted, schedule)
        self.receives_estimates = False
        # The estimator counts its own steps, for it may start afresh where the iterates go on.
        self._step = 1
        super().__init__(base.param_groups, base.defaults)
        self.param_groups = base.param_groups

    @classmethod
    def around(cls, base: Optimizer, estimator: DoubleMomentumEstimator) -> "DoubleMomentum":
        """Wrap ``base`` with the arguments of ``estimator``, which stays the one in use."""
        optimizer = cls(base)
        optimizer.estimator = estimator
        return optimizer

    def __getstate__(self) -> dict[str, Any]:
        """Return what pickling and copying need; of hooks, as with other optimizers, nothing stays."""
        own = {name: self.__dict__[name] for name in ("base", "estimator", "receives_estimates", "_step")}
        return super().__getstate__() | own

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group to the base optimizer, and so to this one, which shares them."""
        if any(param_group is group for group in self.base.param_groups):
            super().add_param_group(param_group)  # called by the constructor for what the base has already
        else:
            parameters = param_group["params"]
            param_group["params"] = [parameters] if isinstance(parameters, Tensor) else list(parameters)
            _check_dtypes([param_group])
            self.base.add_param_group(param_group)

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Take one step; does nothing where there is no gradient.

        Args:
            closure: clears the gradients, computes the loss, its gradients, and returns the loss. It is called at both
                points, unless a strategy takes care of the other one.

        Returns:
            what the closure returned at x_t.

        Raises:
            RuntimeError: from t = 2 on, if nobody gave a gradient at the previous query point.

        """
        if self.receives_estimates:
            loss = _call(closure)
            if not self.estimator.aggregated:
                return loss
            steps = [(parameter, parameter.grad) for parameter in self._parameters() if parameter.grad is not None]
        else:
            loss = self._evaluate(closure)
            steps = self._own_estimates()
        if steps:
            self._move(steps)
            self.estimator.advance()
        else:
            self.estimator.begin()
        return loss

    def take_back(self) -> None:
        """Evaluate both points itself again, after a strategy did: with an estimate of its own, which starts afresh."""
        self.receives_estimates = False
        self.estimator = DoubleMomentumEstimator(**asdict(self.estimator.schedule))

    @contextmanager
    def previous_point(self, scale: float = 1.0) -> Iterator[None]:
        """Take gradients that are computed in this block for g~_t, at x_{t-1}, instead of passing a closure.

        ::

            with optimizer.previous_point():
                loss_function(model(inputs), targets).backward()
            loss_function(model(inputs), targets).backward()
            optimizer.step()

        Parameters hold x_{t-1} inside. Gradients and random numbers are at the end as they were; other side effects of
        the code inside, such as on the statistics of BatchNorm, stay. One block a step: what a second one computes
        takes the place of the first.

        Args:
            scale: what the loss inside is multiplied by, ``scaler.get_scale()`` with a gradient scaler, which does not
                know of g~_t.

        Raises:
            RuntimeError: under a strategy, which does this by itself.

        """
        if self.receives_estimates:
            raise RuntimeError("ByzantineDDPStrategy evaluates the previous point itself: leave out `previous_point`")
        parameters = list(self._parameters())
        gradients = [parameter.grad for parameter in parameters]
        for parameter in parameters:
            parameter.grad = None
        try:
            with replayed_rng(parameters[0].device), self.swapped_to_previous_point():
                yield
            self.estimator.begin(
                # A copy in any case: DDP writes all gradients into the same buffers.
                {name: parameter.grad / scale for name, parameter in self._named() if parameter.grad is not None}
            )
        finally:
            for parameter, gradient in zip(parameters, gradients, strict=True):
                parameter.grad = gradient

    @contextmanager
    def swapped_to_previous_point(self) -> Iterator[None]:
        """Let the parameters hold x_{t-1} inside, by exchange of storages: forward and backward must both be inside."""
        moved = [(parameter, self.state[parameter]) for parameter in self._parameters() if self.state.get(parameter)]
        torch.clear_autocast_cache()
        for parameter, state in moved:
            parameter.data, state["previous"] = state["previous"], parameter.data
        try:
            yield
        finally:
            for parameter, state in moved:
                parameter.data, state["previous"] = state["previous"], parameter.data
            torch.clear_autocast_cache()

    def state_dict(self) -> dict[str, Any]:
        """Return the base's state, with t, w, x_{t-1}, and d unless a strategy keeps it, as one entry more."""
        names = [name for name, parameter in self._named() if self.state.get(parameter)]
        parameters = dict(self._named())
        own: dict[str, Any] = {"step": self._step}
        own |= {key: {name: self.state[parameters[name]][key] for name in names} for key in ("iterate", "previous")}
        if not self.receives_estimates:
            own["estimator"] = {"workers": [self.estimator.worker_state()], "shared": self.estimator.shared_state()}
        return self.base.state_dict() | {_KEY: own}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continue from what :meth:`state_dict` returned.

        Warns, and starts afresh with it, where something is missing: all but the base optimizer's state if
        ``state_dict`` is of an optimizer that was not wrapped, or d if a strategy kept it, one for each worker.
        """
        self.base.load_state_dict(state_dict)
        self.param_groups = self.base.param_groups
        own = state_dict.get(_KEY, {"step": 1, "iterate": {}, "previous": {}})
        self._step = own["step"]
        self.state.clear()
        for name, parameter in self._named():
            if name in own["iterate"]:
                values = {key: own[key][name] for key in ("iterate", "previous")}
                self.state[parameter] = {key: value.to(parameter, copy=True) for key, value in values.items()}
        if _KEY not in state_dict:
            warnings.warn(
                f"The state is one of {type(self.base).__name__} that was not wrapped in DoubleMomentum, so double"
                " momentum starts afresh at the parameters as they are.",
                stacklevel=2,
            )
        if self.receives_estimates:
            return
        if "estimator" in own:
            self.estimator.load_state(**own["estimator"])
        else:
            self.estimator.reset()
            if _KEY in state_dict:
                warnings.warn("The state was saved under a strategy, so the estimate d starts afresh.", stacklevel=2)

    def _evaluate(self, closure: Callable[[], Any] | None) -> Any:
        if closure is None:
            return None
        if _is_lightnings(closure):
            raise RuntimeError(
                "DoubleMomentum got a closure of Lightning's Trainer, whose strategy does not evaluate gradients at the"
                " previous query point. Use `Trainer(strategy='byzantine_ddp')`, on any number of devices."
            )
        if self.estimator.step > 1:
            with self.previous_point():
                _call(closure)
        return _call(closure)

    def _own_estimates(self) -> list[tuple[Tensor, Tensor]]:
        steps = []
        for name, parameter in self._named():
            if parameter.grad is not None:
                estimate = torch.empty_like(parameter.grad)
                self.estimator.estimate(name, parameter.grad, out=estimate)
                steps.append((parameter, estimate))
        return steps

    def _move(self, steps: list[tuple[Tensor, Tensor]]) -> None:
        # w_{t+1} = base step from w_t with alpha_t d^_t;  x_{t+1} = (1 - gamma_t) x_t + gamma_t w_{t+1}
        schedule = self.estimator.schedule
        parameters = [parameter for parameter, _ in steps]
        for parameter in parameters:
            if not self.state[parameter]:
                self.state[parameter] = {"iterate": parameter.clone(), "previous": parameter.clone()}
        iterates = [self.state[parameter]["iterate"] for parameter in parameters]
        queries = [parameter.data for parameter in parameters]
        gradients = [parameter.grad for parameter in parameters]
        alpha = schedule.alpha_at(self._step)
        for parameter, iterate, (_, estimate) in zip(parameters, iterates, steps, strict=True):
            parameter.data, parameter.grad = iterate, estimate if alpha == 1 else estimate * alpha
        try:
            self.base.step()
        finally:
            for parameter, query, gradient in zip(parameters, queries, gradients, strict=True):
                parameter.data, parameter.grad = query, gradient
        # Of all parameters that ever moved: those that did not now were at the previous point where they are.
        for parameter, state in self.state.items():
            state["previous"].copy_(parameter)
        for query, iterate in zip(queries, iterates, strict=True):
            query.lerp_(iterate, schedule.gamma_at(self._step))
        self._step += 1

    def _parameters(self) -> Iterable[Tensor]:
        return (parameter for group in self.param_groups for parameter in group["params"])

    def _named(self) -> Iterable[tuple[str, Tensor]]:
        return ((str(index), parameter) for index, parameter in enumerate(self._parameters()))


def _call(closure: Callable[[], Any] | None) -> Any:
    if closure is None:
        return None
    with torch.enable_grad():
        return closure()


def _check_base(base: Any) -> None:
    if not isinstance(base, Optimizer):
        raise TypeError(f"base must be a torch.optim.Optimizer, such as SGD(model.parameters()), got {base!r}")
    if isinstance(base, DoubleMomentum | LBFGS | SparseAdam):
        raise TypeError(f"base must take one dense gradient a step, which {type(base).__name__} does not")
    _check_dtypes(base.param_groups)


def _check_dtypes(param_groups: list[dict[str, Any]]) -> None:
    for group in param_groups:
        for named in group["params"]:
            parameter = named[1] if isinstance(named, tuple) else named
            if parameter.dtype not in (torch.float32, torch.float64):
                raise TypeError(
                    f"DoubleMomentum needs parameters of float32 or float64, got {parameter.dtype}, in which its small"
                    " steps are lost to rounding. With Lightning, use precision='bf16-mixed' or '16-mixed'."
                )


def _is_lightnings(closure: Callable[[], Any]) -> bool:
    function = getattr(closure, "func", closure)
    return str(getattr(function, "__module__", "")).startswith(("lightning.", "pytorch_lightning."))
