"""The negative of the own estimate."""

from torch import Tensor

from lightning_byzantine.attacks.attack import VectorAttack

__all__ = ["SignFlip"]


class SignFlip(VectorAttack):
    """Each Byzantine worker i sends -x_i, the negative of its own estimate.

    Source: Allen-Zhu et al., "Byzantine-Resilient Non-Convex Stochastic Gradient Descent", ICLR 2021.

    Example:
        >>> import torch
        >>> SignFlip()(torch.tensor([[1.0], [2.0]]), byzantine=[0])
        tensor([[-1.],
                [ 2.]])

    """

    def forge(self, honest: Tensor, own: Tensor) -> Tensor:
        """Return the negative of what the Byzantine workers computed."""
        return -own
