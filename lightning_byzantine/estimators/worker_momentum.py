"""Momentum of each worker's gradients."""

from collections.abc import Collection, Mapping
from itertools import compress
from math import hypot

import torch
from torch import Tensor

from lightning_byzantine.estimators.estimator import Estimator, Scale, Step
from lightning_byzantine.estimators.shared_columns import Columns, SharedColumns
from lightning_byzantine.utilities.checks import check_number
from lightning_byzantine.utilities.few_digits import rounded

__all__ = ["WorkerMomentum", "momentum"]

# The names of what in the state is of no parameter: numbers of steps; sketches, and the parameters these are of.
_STEPS, _SKETCHES, _SKETCHED = "", ".sketches", ".sketched"
# How many times the usual length an honest step may have.
_TOLERANCE = 1.2
# How far the sketch of v^_{t-1} may be from what it was, in its lengths: further only where sketches are made anew.
_NEAR = 1e-3
# The number of steps in checkpoints from before it was counted.
_MANY = 1000


class WorkerMomentum(Estimator):
    """Each worker sends the momentum of its gradients, which has less noise for attackers to hide in.

    ::

        worker i sends          v_t = beta v_{t-1} + (1 - beta) g_t
        everyone aggregates     v^_t = Aggregate(v_t^1 .. v_t^m)
        the optimizer receives  g^_t = (v^_t - beta v^_{t-1}) / (1 - beta)

    With ``transparent=True``, v_0 = v^_0 = 0: under the rule :class:`~lightning_byzantine.aggregators.Mean`, g^_t is
    the mean gradient, so any optimizer trains as it would with stock DDP; under a robust rule,
    ``SGD(momentum=beta)`` moves by exactly the aggregated momentum.

    Undoing the momentum multiplies what changes from one aggregate to the next by 1 / (1 - beta), which Byzantine
    workers use who change sides in every step. So where some may be, and the rule knows distances from its result, the
    step s_t = v^_t - v^_{t-1} is cut to what honest gradients explain before it is multiplied, and v^_t is what g^_t
    then adds up to. For beta > 0, it may be as long as the larger one of two lengths::

        1.2 sqrt(L_t^2 / (1 - beta^t)^2 + N_t^2 (1 + beta) / (1 - beta) / (1 - beta^{2t})) (1 - beta)
        1.2 median_i <g_t^i - v^_{t-1}, s_t> / ||s_t|| (1 - beta)

    The first is that of noise: L_t is the median of ||v_t^i||, N_t the distance of the v_t^i from their aggregate, of
    the (m - f + 1)-th nearest and at most L_t, times the norm of the weights, and the factors turn the noise of
    momentum into that of gradients. The second is how far the workers' gradients go the same way, as all do when the
    gradient changes, or goes to and fro as it does at high learning rates. What is cut off follows in the next steps.

    g_t^i = (v_t^i - beta v_{t-1}^i) / (1 - beta) is known well enough from sketches of what the workers have sent, of
    256 numbers each. Liars who choose vectors by the sketches' signs, which are public, can have the second length
    anywhere between 0 and 1.2 (||g|| + ||v^_{t-1}||) (1 - beta) for an honest g. It is left out for parameters that did
    not take part together before, and after a checkpoint of a model whose columns were divided among other ranks.

    With ``transparent=False`` the optimizer receives v^_t itself and v_1 = g_1, as in the paper's public code: use it
    with an optimizer without momentum.

    Costs one parameter-sized buffer per worker and, when transparent, one more for the columns that the rank
    aggregates; float32 for half-precision parameters.

    Args:
        beta: momentum factor in [0, 1).
        transparent: whether to undo the momentum after the aggregation.

    Source: Karimireddy et al., "Learning from History for Byzantine Robust Optimization", ICML 2021; Dahan & Levy,
    ICML 2024 (arXiv 2405.14759).

    Example:
        >>> estimator, sent, gradient = WorkerMomentum(beta=0.9), torch.empty(1), torch.empty(1)
        >>> estimator.estimate("weight", torch.tensor([2.0]), out=sent)
        >>> estimator.commit({"weight": sent})
        >>> estimator.gradient("weight", aggregate=sent, out=gradient)
        >>> sent, gradient
        (tensor([0.2000]), tensor([2.]))

    """

    def __init__(self, beta: float = 0.9, transparent: bool = True) -> None:
        super().__init__()
        if not 0 <= check_number("beta", beta) < 1:
            raise ValueError(f"beta must satisfy 0 <= beta < 1, got {beta}")
        self.beta = beta
        self.transparent = transparent
        self._aggregate = SharedColumns()
        self._num_steps: dict[str, int] = {}
        # Sketches [m + 1, k] of all v_{t-1}^i and of v^_{t-1}, by the parameters that took part together.
        self._sketches: dict[frozenset[str], Tensor] = {}
        self._share: Tensor | None = None  # of the step that is taken; None for all of it

    def __repr__(self) -> str:
        """Show the arguments."""
        return f"{type(self).__name__}(beta={self.beta}, transparent={self.transparent})"

    @property
    def memory(self) -> float:
        """Return beta."""
        return self.beta

    def reset(self) -> None:
        """Clear all momentum."""
        super().reset()
        self._aggregate.clear()
        self._num_steps.clear()
        self._sketches.clear()
        self._share = None

    def follow(self, last: Tensor | None, gradient: Tensor, previous: Tensor | None, out: Tensor) -> None:
        """Write v_t into ``out``, given v_{t-1}."""
        momentum(last, gradient, self.beta, out, from_zero=self.transparent)

    @property
    def starts(self) -> SharedColumns | None:
        """Return v^_{t-1}; None if nothing is multiplied."""
        return self._aggregate if self.transparent and self.beta > 0 else None

    def place(self, columns: Columns) -> None:
        """Keep these columns of v^_{t-1} only."""
        if self.transparent:
            self._aggregate.place(columns)

    def limit(self, names: Collection[str], scale: Scale | None) -> None:
        """Choose how much of the step to take, with the longest that honest gradients explain."""
        if not self.transparent:
            return
        for name in names:
            self._num_steps[name] = self._num_steps.get(name, 0) + 1
        together = frozenset(names)
        last = self._sketches.get(together)
        for others in [others for others in self._sketches if others & together]:
            del self._sketches[others]
        self._share = None
        # Without momentum, nothing is multiplied.
        if scale is not None and scale.step is not None and names and self.beta > 0:
            start, way = scale.step.sketches[-2:]
            length = scale.step.lengths[1] / (1 - self.beta)
            longest = torch.full_like(length, self._longest_step(scale, names))
            if last is None and all(self._num_steps[name] == 1 for name in names):
                last = torch.zeros_like(scale.step.sketches[:-1])
            if last is not None:
                last = last.to(start.device)
                longest = torch.maximum(longest, self._moved(scale.step, last))
            # Both are 0 if all gradients are.
            self._share = torch.where(length > longest, longest / length, 1.0)
            kept = torch.cat([scale.step.sketches[:-2], (start + self._share * way)[None]])
            # A worker whose vector was not finite keeps its last one, too.
            self._sketches[together] = kept if last is None else torch.where(kept.isnan(), last, kept)

    def gradient(self, name: str, aggregate: Tensor, out: Tensor) -> None:
        """Write g^_t, or v^_t when not transparent, into ``out``."""
        if not self.transparent:
            out.copy_(aggregate)
            return
        previous = self._aggregate.parts.get(name)
        share = 1.0 if self._share is None else self._share.to(aggregate.dtype)
        if isinstance(share, Tensor) and share.device.type == "cpu":
            share = float(share)  # which would make a GPU wait
        if previous is None:
            aggregate = aggregate * share
        _undo_momentum(previous, aggregate, self.beta, out, share)
        if previous is None or self._share is None:
            self._aggregate.keep(name, aggregate)
        else:
            previous.lerp_(aggregate, share)

    def shared_state(self) -> dict[str, Tensor]:
        """Return v^_t, and t of the same parameters, sorted by name; empty when not transparent."""
        aggregate = self._aggregate.whole()
        if not aggregate:
            return {}
        names = sorted(aggregate)
        state = aggregate | {_STEPS: torch.tensor([self._num_steps.get(name, 0) for name in names])}
        if self._sketches:
            state[_SKETCHES] = torch.stack(list(self._sketches.values())).cpu()
            sketched = [[name in together for name in names] for together in self._sketches]
            state[_SKETCHED] = torch.tensor(sketched, dtype=torch.uint8)
        return state

    def load_shared_state(self, state: Mapping[str, Tensor]) -> None:
        """Restore v^_t and t."""
        others = (_STEPS, _SKETCHES, _SKETCHED)
        self._aggregate.load({name: value for name, value in state.items() if name not in others})
        names = sorted(self._aggregate.parts)
        num_steps = state[_STEPS].tolist() if _STEPS in state else [_MANY] * len(names)
        self._num_steps = dict(zip(names, num_steps, strict=True))
        # In checkpoints of before, there are none.
        sketched = state[_SKETCHED].tolist() if _SKETCHED in state else []
        together = [frozenset(compress(names, chosen)) for chosen in sketched]
        self._sketches = dict(zip(together, state[_SKETCHES].clone() if sketched else [], strict=True))

    def to(self, device: torch.device) -> None:
        """Move all state to a device."""
        super().to(device)
        self._aggregate.to(device)
        self._sketches = {together: sketches.to(device) for together, sketches in self._sketches.items()}

    def _longest_step(self, scale: Scale, names: Collection[str]) -> float:
        # Those that have begun last have the shortest momentum.
        decay = self.beta ** min(self._num_steps[name] for name in names)
        signal, noise = scale.length / (1 - decay), scale.noise / (1 - decay * decay) ** 0.5
        return _TOLERANCE * hypot(signal, noise * ((1 + self.beta) / (1 - self.beta)) ** 0.5)

    def _moved(self, step: Step, last: Tensor) -> Tensor:
        """Return how far the usual worker's gradient goes along the step, []; 0 if that is not known."""
        start = step.sketches[-2]
        is_same = (start - last[-1]).norm() <= _NEAR * start.norm()
        # Liars know the signs, and could make what they have moved look longer in sketches than it is.
        start, way = (_at_most(*pair) for pair in zip(step.sketches[-2:], step.lengths, strict=True))
        gradients = (step.sketches[:-2] - self.beta * last[:-1]) / (1 - self.beta)
        moved = (gradients - start) @ way / step.lengths[1].clamp(min=torch.finfo(torch.float64).tiny)
        # The lower one of the middle two, so that it is within honest ones'. torch.nanmedian would make a GPU wait.
        num_known = len(moved) - moved.isnan().sum()
        middle = (num_known - 1).clamp(min=0) // 2
        usual = moved.nan_to_num(nan=torch.inf).sort().values.gather(0, middle[None])[0]
        return torch.where(is_same & (num_known > 0), rounded(_TOLERANCE * usual, digits=8), 0.0)


def _at_most(sketch: Tensor, length: Tensor) -> Tensor:
    """Return the sketch, or a shorter one if it is longer than the vector."""
    norm: Tensor = torch.linalg.vector_norm(sketch)
    return sketch * (length / norm.clamp(min=torch.finfo(torch.float64).tiny)).clamp(max=1.0)


def momentum(previous: Tensor | None, gradient: Tensor, beta: float, out: Tensor, from_zero: bool = True) -> None:
    """Write v_t = beta v_{t-1} + (1 - beta) g_t.

    Args:
        previous: v_{t-1}; None in the first step.
        gradient: g_t, in the dtype of ``out``.
        beta: momentum factor.
        out: result.
        from_zero: True for v_0 = 0, False for v_1 = g_1.

    """
    if previous is None:
        torch.mul(gradient, 1 - beta if from_zero else 1.0, out=out)
    else:
        torch.lerp(gradient, previous, beta, out=out)


def _undo_momentum(
    previous: Tensor | None, aggregate: Tensor, beta: float, out: Tensor, share: float | Tensor = 1.0
) -> None:
    # g^_t = (v^_t - beta v^_{t-1}) / (1 - beta) = v^_{t-1} + (v^_t - v^_{t-1}) / (1 - beta), of a share of the step
    if previous is None:
        torch.div(aggregate, 1 - beta, out=out)
    elif out.dtype == aggregate.dtype:
        torch.lerp(previous, aggregate, share / (1 - beta), out=out)
    else:
        out.copy_(torch.lerp(previous, aggregate, share / (1 - beta)))
