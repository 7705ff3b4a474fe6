"""All Byzantine workers hide in the honest workers' noise, as deep as the rule in use lets them."""

from lightning_byzantine.aggregators.aggregator import Aggregator
from lightning_byzantine.attacks.a_little_is_enough import ALittleIsEnough
from lightning_byzantine.attacks.optimal_attack import OptimalAttack
from lightning_byzantine.utilities.checks import check_finite

__all__ = ["OptimalALittleIsEnough"]


class OptimalALittleIsEnough(OptimalAttack):
    """ALIE, mu - z sigma, with the z that moves the rule in use farthest from the honest mean.

    Args:
        aggregator: the rule to attack. None for the one in use in training, which is ``Mean`` under stock ``ddp``.
        num_byzantine: the f that the rule is called with. None for the strategy's in training, and for the number of
            Byzantine workers elsewhere.
        evaluations: how many z to try in each step, at the cost of one run of the rule each.
        step: the first z to try after 0; a negative one searches mu + |z| sigma.

    Source: Baruch et al., "A Little Is Enough: Circumventing Defenses for Distributed Learning", NeurIPS 2019; with a
    line search in Allouah et al., "Fixing by Mixing: A Recipe for Optimal Byzantine ML under Heterogeneity",
    AISTATS 2023.

    Example:
        >>> import torch
        >>> from lightning_byzantine.aggregators import CoordinateWiseMedian
        >>> attack = OptimalALittleIsEnough(aggregator=CoordinateWiseMedian())
        >>> attack(torch.tensor([[1.0], [2.0], [3.0], [4.0], [0.0]]), byzantine=[4])[4] < 2.0
        tensor([True])

    """

    def __init__(
        self,
        aggregator: Aggregator | None = None,
        num_byzantine: int | None = None,
        evaluations: int = 20,
        step: float = 1.0,
    ) -> None:
        super().__init__(aggregator, num_byzantine, evaluations, step)
        check_finite("step", step)
        if step == 0:
            raise ValueError(f"step must not be 0, got {step}")

    def with_factor(self, factor: float) -> ALittleIsEnough:
        """Return ALIE with that z."""
        return ALittleIsEnough(z=factor)
