"""Zero instead of an estimate."""

import torch
from torch import Tensor

from lightning_byzantine.attacks.attack import VectorAttack

__all__ = ["Zero"]


class Zero(VectorAttack):
    """Each Byzantine worker sends 0 in every coordinate, like a worker that pretends to compute.

    Example:
        >>> Zero()(torch.ones(2, 2), byzantine=[0])
        tensor([[0., 0.],
                [1., 1.]])

    """

    def forge(self, honest: Tensor, own: Tensor) -> Tensor:
        """Return 0."""
        return torch.zeros_like(own)
