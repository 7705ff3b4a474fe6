"""NaN instead of an estimate."""

import torch
from torch import Tensor

from lightning_byzantine.attacks.attack import VectorAttack

__all__ = ["NonFinite"]


class NonFinite(VectorAttack):
    """Each Byzantine worker sends NaN in every coordinate, like a faulty GPU.

    Example:
        >>> NonFinite()(torch.zeros(2, 2), byzantine=[0])
        tensor([[nan, nan],
                [0., 0.]])

    """

    def forge(self, honest: Tensor, own: Tensor) -> Tensor:
        """Return NaN."""
        return torch.full_like(own, torch.nan)
