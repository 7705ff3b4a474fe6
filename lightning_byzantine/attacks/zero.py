"""Nothing."""

import torch
from torch import Tensor

from lightning_byzantine.attacks.attack import VectorAttack

__all__ = ["Zero"]


class Zero(VectorAttack):
    """Each Byzantine worker sends 0 in every coordinate, as one that does not work but wants to look as if it did.

    Example:
        >>> Zero()(torch.ones(2, 2), byzantine=[0])
        tensor([[0., 0.],
                [1., 1.]])

    """

    def forge(self, honest: Tensor, own: Tensor) -> Tensor:
        """Return 0."""
        return torch.zeros_like(own)
