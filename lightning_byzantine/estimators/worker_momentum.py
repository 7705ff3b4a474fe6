"""The momentum of a worker's gradients."""

from collections import defaultdict
from collections.abc import Sequence

import torch
from torch import Tensor

from lightning_byzantine.estimators.estimator import Estimator, keep
from lightning_byzantine.utilities.checks import check_number

__all__ = ["WorkerMomentum"]


class WorkerMomentum(Estimator):
    """Each worker sends the momentum of its gradients, in which attackers find less noise to hide.

    ::

        worker i sends          v_t = beta v_{t-1} + (1 - beta) g_t
        everyone aggregates     v^_t = Aggregate(v_t^1 .. v_t^m)
        the optimizer receives  g^_t = (v^_t - beta v^_{t-1}) / (1 - beta)

    With ``transparent=True``, v_0 = v^_0 = 0: under the rule :class:`~lightning_byzantine.aggregators.Mean`, g^_t is
    the mean gradient, so any optimizer trains as it would with stock DDP; under a robust rule,
    ``SGD(momentum=beta)`` moves by exactly the aggregated momentum. With ``transparent=False`` the optimizer receives
    v^_t itself and v_1 = g_1, as in the paper's public code: use it with an optimizer without momentum of its own.

    Costs one parameter-sized buffer a worker, and one more when transparent; float32 for half-precision parameters.

    Args:
        beta: momentum factor in [0, 1).
        transparent: whether to undo the momentum after the aggregation.

    Source: Karimireddy et al., "Learning from History for Byzantine Robust Optimization", ICML 2021; Dahan & Levy,
    ICML 2024 (arXiv 2405.14759).

    Example:
        >>> momentum, sent, gradient = WorkerMomentum(beta=0.9), torch.empty(1), torch.empty(1)
        >>> momentum.estimate("weight", torch.tensor([2.0]), out=sent)
        >>> momentum.commit()
        >>> momentum.gradient("weight", aggregate=sent, out=gradient)
        >>> sent, gradient
        (tensor([0.2000]), tensor([2.]))

    """

    def __init__(self, beta: float = 0.9, transparent: bool = True) -> None:
        check_number("beta", beta)
        if not 0 <= beta < 1:
            raise ValueError(f"beta must satisfy 0 <= beta < 1, got {beta}")
        self.beta = beta
        self.transparent = transparent
        self.reset()

    def __repr__(self) -> str:
        """Show the arguments."""
        return f"{type(self).__name__}(beta={self.beta}, transparent={self.transparent})"

    @property
    def memory(self) -> float:
        """Return beta."""
        return self.beta

    def reset(self) -> None:
        """Forget all momentum."""
        self._momentum: defaultdict[int, dict[str, Tensor]] = defaultdict(dict)
        self._pending: defaultdict[int, dict[str, Tensor]] = defaultdict(dict)
        self._aggregate: dict[str, Tensor] = {}

    def estimate(self, name: str, gradient: Tensor, out: Tensor, worker: int = 0) -> None:
        """Write v_t into ``out``."""
        _momentum(self._momentum[worker].get(name), gradient, self.beta, self.transparent, out)
        self._pending[worker][name] = out

    def commit(self, worker: int = 0) -> None:
        """Make v_t the momentum."""
        keep(self._pending.pop(worker, {}), self._momentum[worker])

    def discard(self, worker: int = 0) -> None:
        """Keep v_{t-1}."""
        self._pending.pop(worker, None)

    def gradient(self, name: str, aggregate: Tensor, out: Tensor) -> None:
        """Write g^_t, or v^_t when not transparent, into ``out``."""
        if not self.transparent:
            out.copy_(aggregate)
            return
        _undo_momentum(self._aggregate.get(name), aggregate, self.beta, out)
        keep({name: aggregate}, self._aggregate)

    def worker_state(self, worker: int = 0) -> dict[str, Tensor]:
        """Return v_t."""
        return dict(self._momentum[worker])

    def shared_state(self) -> dict[str, Tensor]:
        """Return v^_t; empty when not transparent."""
        return dict(self._aggregate)

    def load_state(self, workers: Sequence[dict[str, Tensor]], shared: dict[str, Tensor]) -> None:
        """Continue from v_t and v^_t."""
        self.reset()
        for worker, state in enumerate(workers):
            keep(state, self._momentum[worker])
        keep(shared, self._aggregate)


def _momentum(previous: Tensor | None, gradient: Tensor, beta: float, from_zero: bool, out: Tensor) -> None:
    # v_t = beta v_{t-1} + (1 - beta) g_t, and v_1 = (1 - beta) g_1 from zero or g_1 from the gradient
    if previous is None:
        torch.mul(gradient, 1 - beta if from_zero else 1.0, out=out)
    else:
        torch.lerp(gradient, previous, beta, out=out)


def _undo_momentum(previous: Tensor | None, aggregate: Tensor, beta: float, out: Tensor) -> None:
    # g^_t = (v^_t - beta v^_{t-1}) / (1 - beta) = v^_{t-1} + (v^_t - v^_{t-1}) / (1 - beta)
    if previous is None:
        torch.div(aggregate, 1 - beta, out=out)
    elif out.dtype == aggregate.dtype:
        torch.lerp(previous, aggregate, 1 / (1 - beta), out=out)
    else:
        out.copy_(torch.lerp(previous, aggregate, 1 / (1 - beta)))
