"""All Byzantine workers push against the honest mean, as hard as the rule in use lets them."""

from lightning_byzantine.aggregators.aggregator import Aggregator
from lightning_byzantine.attacks.inner_product_manipulation import InnerProductManipulation
from lightning_byzantine.attacks.optimal_attack import OptimalAttack
from lightning_byzantine.utilities.checks import check_positive

__all__ = ["OptimalInnerProductManipulation"]


class OptimalInnerProductManipulation(OptimalAttack):
    """IPM, -epsilon mu, with the epsilon that moves the rule in use farthest from the honest mean mu.

    Args:
        aggregator: the rule to attack. None for the one in use in training, which is ``Mean`` under stock ``ddp``.
        num_byzantine: the f that the rule is called with. None for the strategy's in training, and for the number of
            Byzantine workers elsewhere.
        evaluations: how many epsilons to try in each step, at the cost of one run of the rule each.
        step: the first epsilon to try after 0.

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

    def __init__(
        self,
        aggregator: Aggregator | None = None,
        num_byzantine: int | None = None,
        evaluations: int = 20,
        step: float = 1.0,
    ) -> None:
        super().__init__(aggregator, num_byzantine, evaluations, step)
        check_positive("step", step)

    def with_factor(self, factor: float) -> InnerProductManipulation:
        """Return IPM with that epsilon."""
        return InnerProductManipulation(epsilon=factor)
