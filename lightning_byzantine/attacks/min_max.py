"""As far from the honest mean as honest workers are from each other."""

from collections.abc import Callable, Sequence
from typing import Literal

import torch
from torch import Tensor

from lightning_byzantine.attacks.attack import VectorAttack, forge_rows, honest_workers
from lightning_byzantine.matrix import WorkerMatrix
from lightning_byzantine.utilities.checks import check_choice

__all__ = ["MinMax"]

_PERTURBATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    # The deviation of a single row is NaN.
    "std": lambda honest: -honest.std(dim=0) if len(honest) > 1 else torch.zeros_like(honest[0]),
    "unit": lambda honest: -honest.mean(dim=0),  # not normalized: gamma is in units of its length
    "sign": lambda honest: -honest.mean(dim=0).sign(),
}


class MinMax(VectorAttack):
    """All Byzantine workers send mu + gamma p, where mu is the honest mean and p a direction.

    gamma is the largest value with max_i ||mu + gamma p - x_i|| <= max_ij ||x_i - x_j|| over honest rows i and j. Each
    i gives a quadratic equation with one positive root; gamma is the smallest of these.

    Args:
        perturbation: p: "std" for -sigma, the standard deviation of the honest rows in each coordinate; "unit" for
            -mu / ||mu||; "sign" for -sign(mu).

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
        self.perturbation = check_choice("perturbation", perturbation, _PERTURBATIONS)

    def tamper(self, matrix: WorkerMatrix, byzantine: Sequence[int]) -> WorkerMatrix:
        """Return a matrix with forged Byzantine rows, by the distances between the honest ones."""
        perturbation = _PERTURBATIONS[self.perturbation]
        workers = honest_workers(matrix, byzantine)
        gamma = _largest_gamma(matrix.map_blocks(lambda block: block[workers].double()), perturbation)

        def forge(honest: Tensor, own: Tensor) -> Tensor:
            return (honest.mean(dim=0) + gamma * perturbation(honest)).expand_as(own)

        return forge_rows(matrix, byzantine, forge)


def _largest_gamma(honest: WorkerMatrix, perturbation: Callable[[Tensor], Tensor]) -> float:
    """Return the smallest positive root of ||mu - x_i||^2 + 2 gamma p.(mu - x_i) + gamma^2 ||p||^2 = diameter^2."""
    diameter = honest.squared_distances().max().sqrt()
    offsets = honest.map_blocks(lambda rows: rows.mean(dim=0) - rows)
    direction = honest.map_blocks(lambda rows: perturbation(rows)[None])
    length = direction.squared_norms().sqrt()
    if length == 0 or diameter == 0:
        return 0.0
    # Scaled to the length of the diameter, so that the inner products below do not lose digits.
    scale = (diameter / length).item()
    forward = [scale * block[0] for block in direction.blocks]
    backward = [-part for part in forward]
    products = (offsets.distances(backward).square() - offsets.distances(forward).square()) / 4
    remaining = (diameter.square() - offsets.squared_norms()).clamp(min=0)
    # Of the equivalent forms -b + sqrt(b^2 + ac) and c / (b + sqrt(b^2 + ac)), the one without cancellation.
    roots = (products.square() + diameter.square() * remaining).sqrt()
    gammas = torch.where(products > 0, remaining / (products + roots), (roots - products) / diameter.square())
    return scale * gammas.min().item()
