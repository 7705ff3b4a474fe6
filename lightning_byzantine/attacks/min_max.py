"""All Byzantine workers go as far as the honest ones' disagreement hides them."""

from collections.abc import Callable, Sequence
from typing import Literal

import torch
from torch import Tensor

from lightning_byzantine.attacks.attack import VectorAttack
from lightning_byzantine.matrix import WorkerMatrix

__all__ = ["MinMax"]

_PERTURBATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    # One row has no deviation.
    "std": lambda honest: -honest.std(dim=0) if len(honest) > 1 else torch.zeros_like(honest[0]),
    "unit": lambda honest: -honest.mean(dim=0),  # gamma makes up for the norm
    "sign": lambda honest: -honest.mean(dim=0).sign(),
}


class MinMax(VectorAttack):
    """All Byzantine workers send mu + gamma p: from the honest mean mu along p, as far as honest rows are apart.

    gamma is the largest one with max_i ||mu + gamma p - x_i|| <= max_ij ||x_i - x_j|| over honest rows i and j, that is
    the least of the positive roots, one for each i, of a quadratic equation.

    Args:
        perturbation: p: "std" for -sigma, the honest rows' deviation in each coordinate; "unit" for -mu / ||mu||;
            "sign" for -sign(mu).

    Source: Shejwalkar & Houmansadr, "Manipulating the Byzantine: Optimizing Model Poisoning Attacks and Defenses for
    Federated Learning", NDSS 2021.

    Example:
        >>> MinMax()(torch.tensor([[1.0], [2.0], [3.0], [9.0]]), byzantine=[3])
        tensor([[1.],
                [2.],
                [3.],
                [1.]])

    """

    def __init__(self, perturbation: Literal["std", "unit", "sign"] = "std") -> None:
        super().__init__()
        if perturbation not in _PERTURBATIONS:
            raise ValueError(f"perturbation must be one of {', '.join(_PERTURBATIONS)}, got {perturbation!r}")
        self.perturbation = perturbation
        self._gamma = 0.0

    def extra_repr(self) -> str:
        """Show the argument in ``repr``."""
        return f"perturbation={self.perturbation!r}"

    def tamper(self, matrix: WorkerMatrix, byzantine: Sequence[int]) -> WorkerMatrix:
        """Return a matrix with the Byzantine rows forged, after a look at the honest rows' distances."""
        honest = [row for row in range(matrix.num_workers) if row not in byzantine]
        self._gamma = self._largest_gamma(matrix.map_blocks(lambda block: block[honest].double()))
        return super().tamper(matrix, byzantine)

    def forge(self, honest: Tensor, own: Tensor) -> Tensor:
        """Return mu + gamma p, once for each Byzantine worker."""
        return (honest.mean(dim=0) + self._gamma * self._direction(honest)).expand_as(own)

    def _direction(self, honest: Tensor) -> Tensor:
        return _PERTURBATIONS[self.perturbation](honest)

    def _largest_gamma(self, honest: WorkerMatrix) -> float:
        """Solve ||mu - x_i||^2 + 2 gamma p.(mu - x_i) + gamma^2 ||p||^2 = diameter^2 for all i; return the least."""
        diameter = honest.squared_distances().max().sqrt()
        offsets = honest.map_blocks(lambda rows: rows.mean(dim=0) - rows)
        direction = honest.map_blocks(lambda rows: self._direction(rows)[None])
        length = direction.squared_norms().sqrt()
        if length == 0 or diameter == 0:
            return 0.0  # no way to go, or no room
        # A direction as long as the diameter, for the inner products below not to lose digits.
        scale = (diameter / length).item()
        forward = [scale * block[0] for block in direction.blocks]
        backward = [-part for part in forward]
        products = (offsets.distances(backward).square() - offsets.distances(forward).square()) / 4
        room = (diameter.square() - offsets.squared_norms()).clamp(min=0)
        # Of -b + sqrt(b^2 + ac) and c / (b + sqrt(b^2 + ac)), the form that does not subtract.
        roots = (products.square() + diameter.square() * room).sqrt()
        gammas = torch.where(products > 0, room / (products + roots), (roots - products) / diameter.square())
        return scale * gammas.min().item()
