"""ALIE with the z that does the most harm to the rule in use."""

from lightning_byzantine.attacks.a_little_is_enough import ALittleIsEnough
from lightning_byzantine.attacks.optimal_attack import OptimalAttack

__all__ = ["OptimalALittleIsEnough"]


class OptimalALittleIsEnough(OptimalAttack):
    """ALIE, mu - z sigma, with the z that moves the result of the rule in use farthest from the honest mean.

    Args:
        aggregator: the rule to attack. None for the one in use in training, which is ``Mean`` under stock ``ddp``.
        num_byzantine: the f that the rule is called with. None for the strategy's in training, and for the number of
            Byzantine workers elsewhere.
        evaluations: number of z to try in each step; each costs one run of the rule.
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

    def with_factor(self, factor: float) -> ALittleIsEnough:
        """Return ALIE with this z."""
        return ALittleIsEnough(z=factor)
