"""A multiple of the own estimate."""

from torch import Tensor

from lightning_byzantine.attacks.attack import VectorAttack
from lightning_byzantine.utilities.checks import check_finite

__all__ = ["Scale"]


class Scale(VectorAttack):
    """Each Byzantine worker i sends factor * x_i, a multiple of its own estimate.

    Args:
        factor: any finite number; -1 makes it :class:`~lightning_byzantine.attacks.SignFlip`.

    Source: Bagdasaryan et al., "How To Backdoor Federated Learning", AISTATS 2020.

    Example:
        >>> import torch
        >>> Scale(factor=10.0)(torch.tensor([[1.0], [2.0]]), byzantine=[0])
        tensor([[10.],
                [ 2.]])

    """

    def __init__(self, factor: float) -> None:
        super().__init__()
        self.factor = check_finite("factor", factor)

    def forge(self, honest: Tensor, own: Tensor) -> Tensor:
        """Return ``factor`` times what the Byzantine workers computed."""
        return self.factor * own
