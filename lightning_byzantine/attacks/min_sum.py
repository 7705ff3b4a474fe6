"""As near to all honest workers together as the most central one of them."""

from lightning_byzantine.attacks.honest_statistics import honest_distances
from lightning_byzantine.attacks.moved_mean import MovedMean
from lightning_byzantine.matrix import WorkerMatrix

__all__ = ["MinSum"]


class MinSum(MovedMean):
    """All Byzantine workers send mu + gamma p, where mu is the honest mean and p a direction.

    gamma is the largest value with sum_j ||mu + gamma p - x_j||^2 <= min_i sum_j ||x_i - x_j||^2 over honest rows i and
    j, as in the authors' code. Since sum_j ||y - x_j||^2 = n ||y - mu||^2 + sum_j ||mu - x_j||^2 for any y and n rows,
    that is as far from mu as the honest row that is nearest to it.

    Args:
        perturbation: p: "std" for -sigma, the standard deviation of the honest rows in each coordinate; "unit" for
            -mu / ||mu||; "sign" for -sign(mu).

    Source: Shejwalkar & Houmansadr, "Manipulating the Byzantine: Optimizing Model Poisoning Attacks and Defenses for
    Federated Learning", NDSS 2021; https://github.com/vrt1shjwlkr/NDSS21-Model-Poisoning.

    Example:
        >>> import torch
        >>> MinSum()(torch.tensor([[1.0], [5.0], [9.0], [13.0], [0.0]]), byzantine=[4])[4]
        tensor([5.])

    """

    def distance(self, honest: WorkerMatrix, direction: WorkerMatrix) -> float:
        """Return the smallest distance of an honest row from the mean."""
        return honest_distances(honest).min().item()
