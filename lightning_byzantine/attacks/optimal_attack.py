"""The base class of attacks that search their strength against the rule in use."""

from abc import abstractmethod
from collections.abc import Callable, Sequence
from copy import deepcopy

import torch

from lightning_byzantine.aggregators.aggregator import Aggregator
from lightning_byzantine.attacks.attack import VectorAttack, honest_workers
from lightning_byzantine.errors import ByzantineBreakdownError
from lightning_byzantine.matrix import WorkerMatrix
from lightning_byzantine.utilities.checks import check_finite, check_integer_at_least

__all__ = ["OptimalAttack", "line_search"]

# Factor on the step after a trial that did not improve.
_RATIO = 0.8


class OptimalAttack(VectorAttack):
    """An attack with a factor that is chosen in every step to do the most harm to the rule in use.

    Harm is the distance between the mean of the honest rows and the rule's result on the forged matrix, maximized by
    :func:`line_search`. Each trial costs one run of the rule and a copy of the matrix. The trials use a copy of the
    rule, whose own state and random draws do not change.

    To write one, override :meth:`with_factor`.

    Args:
        aggregator: the rule to attack. None for the one in use in training, which is ``Mean`` under stock ``ddp``.
        num_byzantine: the f that the rule is called with. None for the strategy's in training, and for the number of
            Byzantine workers elsewhere.
        evaluations: number of factors to try in each step.
        step: the first factor to try after 0.

    """

    def __init__(
        self,
        aggregator: Aggregator | None = None,
        num_byzantine: int | None = None,
        evaluations: int = 20,
        step: float = 1.0,
    ) -> None:
        super().__init__()
        if aggregator is not None and not isinstance(aggregator, Aggregator):
            raise TypeError(f"aggregator must be an Aggregator, such as Krum(), got {aggregator!r}")
        if num_byzantine is not None:
            check_integer_at_least("num_byzantine", num_byzantine, 0)
        self.num_byzantine = num_byzantine
        self.evaluations = check_integer_at_least("evaluations", evaluations, 2)
        self.step = self.check_step(step)
        # In tuples, so that torch does not register them as submodules: a rule's state is not part of the attack's.
        self._given = (aggregator,)
        self._in_use: tuple[Aggregator | None, int | None] = (None, None)

    @property
    def aggregator(self) -> Aggregator | None:
        """The rule to attack; None until it is known."""
        return self._given[0] or self._in_use[0]

    def extra_repr(self) -> str:
        """Show the arguments in ``repr``."""
        return f"aggregator={self._given[0]!r}, {super().extra_repr()}"

    def bind(self, aggregator: Aggregator, num_byzantine: int) -> None:
        """Receive the rule in use and the f that it is called with."""
        self._in_use = (aggregator, num_byzantine)

    def check(self, num_workers: int, byzantine: Sequence[int]) -> None:
        """Raise :class:`ValueError` if no rule is known, or the rule does not allow these workers."""
        super().check(num_workers, byzantine)
        aggregator, num_byzantine = self._called_as(byzantine)
        aggregator.check(num_workers, num_byzantine)

    @abstractmethod
    def with_factor(self, factor: float) -> VectorAttack:
        """Return the attack with this factor."""

    def check_step(self, step: float) -> float:
        """Return ``step`` if it is a first factor that the attack accepts; raise otherwise."""
        if check_finite("step", step) == 0:
            raise ValueError(f"step must not be 0, got {step}")
        return step

    def tamper(self, matrix: WorkerMatrix, byzantine: Sequence[int]) -> WorkerMatrix:
        """Return a matrix with the Byzantine rows forged with the factor that does the most harm."""
        aggregator, num_byzantine = self._called_as(byzantine)
        honest = honest_workers(matrix, byzantine)
        mean = matrix.map_blocks(lambda block: block[honest].double().mean(dim=0, keepdim=True))

        def harm(factor: float) -> float:
            forged = self.with_factor(factor).tamper(matrix, byzantine)
            try:
                return mean.distances(deepcopy(aggregator).aggregate(forged, num_byzantine)).item()
            except ByzantineBreakdownError:
                return -torch.inf  # stopping the training would expose the attackers

        factor = line_search(harm, self.step, self.evaluations)
        return self.with_factor(factor).tamper(matrix, byzantine)

    def _called_as(self, byzantine: Sequence[int]) -> tuple[Aggregator, int]:
        """Return the rule to attack, and the f that it is called with."""
        if self.aggregator is None:
            raise ValueError(
                "aggregator must be given where no strategy provides one, got aggregator=None. Pass"
                f" {type(self).__name__}(aggregator=...)."
            )
        bounds = (self.num_byzantine, self._in_use[1], len(byzantine))
        return self.aggregator, next(bound for bound in bounds if bound is not None)


def line_search(harm: Callable[[float], float], step: float, evaluations: int) -> float:
    """Return the factor that did the most harm of those tried; of several, the one nearest to 0.

    Starting from 0, steps double as long as each does more harm than the last; after that, every step is 0.8 times the
    previous one, and is taken if it does more harm than the best so far.

    Args:
        harm: the function of the factor to maximize.
        step: the first step; its sign is the direction of the search.
        evaluations: number of calls of ``harm``.

    Source: the search of ByzFL 0.0.11, https://github.com/LPD-EPFL/byzfl, after Allouah et al., "Fixing by Mixing: A
    Recipe for Optimal Byzantine ML under Heterogeneity", AISTATS 2023.

    Example:
        >>> round(line_search(lambda factor: factor if factor < 3.3 else 0.0, step=1.0, evaluations=20), 2)
        3.27

    """
    best, most = 0.0, harm(0.0)
    grows = True
    for _ in range(evaluations - 1):
        trial = best + step
        if (value := harm(trial)) > most:
            best, most = trial, value
        else:
            grows = False
        step *= 2 if grows else _RATIO
    return best
