"""IPM: a small step against the honest mean."""

from torch import Tensor

from lightning_byzantine.attacks.attack import VectorAttack
from lightning_byzantine.utilities.checks import check_at_least

__all__ = ["InnerProductManipulation"]


class InnerProductManipulation(VectorAttack):
    """All Byzantine workers send -epsilon * mean(honest): small enough to be accepted, and pointing uphill.

    Args:
        epsilon: length, in multiples of the honest mean.

    Source: Xie et al., "Fall of Empires: Breaking Byzantine-tolerant SGD by Inner Product Manipulation", UAI 2019.

    Example:
        >>> import torch
        >>> InnerProductManipulation(epsilon=0.5)(torch.tensor([[1.0], [3.0], [9.0]]), byzantine=[2])
        tensor([[ 1.],
                [ 3.],
                [-1.]])

    """

    def __init__(self, epsilon: float = 0.5) -> None:
        super().__init__()
        self.epsilon = check_at_least("epsilon", epsilon, 0)

    def forge(self, honest: Tensor, own: Tensor) -> Tensor:
        """Return -epsilon times the honest mean, once for each Byzantine worker."""
        return (-self.epsilon * honest.mean(dim=0)).expand_as(own)
