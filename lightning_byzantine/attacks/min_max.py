"""As far from the honest mean as honest workers are from each other."""

import torch

from lightning_byzantine.attacks.moved_mean import MovedMean
from lightning_byzantine.matrix import WorkerMatrix

__all__ = ["MinMax"]


class MinMax(MovedMean):
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

    def distance(self, honest: WorkerMatrix, direction: WorkerMatrix) -> float:
        """Return the smallest positive root of ||mu - x_i||^2 + 2 gamma p.(mu - x_i) + gamma^2 ||p||^2 = diameter^2."""
        diameter = honest.squared_distances().max().sqrt()
        offsets = honest.map_blocks(lambda rows: rows.mean(dim=0) - rows)
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
        return (diameter * gammas.min()).item()
