"""IPM with the epsilon that does the most harm to the rule in use."""

from lightning_byzantine.attacks.inner_product_manipulation import InnerProductManipulation
from lightning_byzantine.attacks.optimal_attack import OptimalAttack
from lightning_byzantine.utilities.checks import check_positive

__all__ = ["OptimalInnerProductManipulation"]


class OptimalInnerProductManipulation(OptimalAttack):
    """IPM, -epsilon mu, with the epsilon that moves the result of the rule in use farthest from the honest mean mu.

    Args:
        aggregator: the rule to attack. None for the one in use in training, which is ``Mean`` under stock ``ddp``.
        num_byzantine: the f that the rule is called with. None for the strategy's in training, and for the number of
            Byzantine workers elsewhere.
        evaluations: number of epsilons to try in each step; each costs one run of the rule.
        step: the first epsilon to try after 0; positive.

    Source: Xie et al., "Fall of Empires: Breaking Byzantine-tolerant SGD by Inner Product Manipulation", UAI 2019; with
    a line search in Allouah et al., "Fixing by Mixing: A Recipe for Optimal Byzantine ML under Heterogeneity",
    AISTATS 2023.

    Example:
        >>> import torch
        >>> from lightning_byzantine.aggregators import CoordinateWiseMedian
        >>> attack = OptimalInnerProductManipulation(aggregator=CoordinateWiseMedian())
        >>> attack(torch.tensor([[1.0], [2.0], [3.0], [4.0], [0.0]]), byzantine=[4])[4]
        tensor([-0.])

    """

    def with_factor(self, factor: float) -> InnerProductManipulation:
        """Return IPM with this epsilon."""
        return InnerProductManipulation(epsilon=factor)

    def check_step(self, step: float) -> float:
        """Return ``step`` if it is above 0; raise otherwise."""
        return check_positive("step", step)
