"""A filter of what deviates step after step; the default rule."""

import torch
from torch import Tensor

from lightning_byzantine.aggregators.aggregator import Aggregator
from lightning_byzantine.aggregators.histories import Histories
from lightning_byzantine.aggregators.loud_directions import explaining_workers
from lightning_byzantine.aggregators.middles import distances_from, middle_weights, products_about, smallest
from lightning_byzantine.matrix import Measurement, Point, WorkerMatrix

__all__ = ["PersistentFilter"]

# Workers whose average squared deviation is over this many usual ones are left out.
_FAR = 4.0
# Rows are clipped to this many times the distance of the (m - f)-th row.
_SLACK = 1.5


class PersistentFilter(Aggregator):
    """The mean of the workers that don't deviate persistently, with outliers clipped; decided in each parameter."""

    uses_products = True

    def __init__(self) -> None:
        super().__init__()
        self.histories = Histories()

    def reset(self) -> None:
        """Forget what the workers have sent."""
        self.histories.clear()

    def measure(self, matrix: WorkerMatrix, num_byzantine: int) -> Measurement:
        """Return which rows can be used."""
        return matrix.measure(from_products=True, split=True)

    def locate(self, matrix: WorkerMatrix, num_byzantine: int) -> Point:
        """Return the mean of the rows that are left, each segment with its own weights."""
        if num_byzantine == 0:
            return matrix.mean()
        parts = matrix.split()
        products = torch.stack([part.products() for part in parts.values()])
        kept = self._kept(list(parts), matrix, products, num_byzantine)
        weights = _clipped(products, kept, num_byzantine)
        return matrix.join([part.combine(of_part) for part, of_part in zip(parts.values(), weights, strict=True)])

    def _kept(self, names: list[str], matrix: WorkerMatrix, products: Tensor, num_byzantine: int) -> Tensor:
        """Return which rows deviate no more than noise does, [s, n] bool."""
        everyone = torch.ones(products.shape[:2], dtype=torch.bool)
        deviations = products_about(products, middle_weights(products, everyone))
        averages, sizes = self.histories.updated(names, matrix.workers, deviations, matrix.num_offered)
        kept = ~explaining_workers(averages, num_byzantine)
        # Then those that are far away in any direction, as long as no more than f are left out.
        order = sizes.masked_fill(~kept, torch.inf).argsort(dim=1, descending=True, stable=True)
        is_among_farthest = order.argsort(dim=1) < num_byzantine
        return kept & ~(is_among_farthest & (sizes > _FAR))


def _clipped(products: Tensor, kept: Tensor, num_byzantine: int) -> Tensor:
    """Return the weights of the mean of the kept rows, clipped to a ball around their geometric median, [s, n]."""
    centers = middle_weights(products, kept)
    distances = distances_from(products, centers)
    num_honest = torch.full((len(kept), 1), kept.shape[1] - num_byzantine)
    radius = _SLACK * smallest(distances, kept, num_honest)
    is_far = (distances > radius) & kept
    mean = torch.where(is_far, radius / distances, 1.0) * kept / kept.sum(1, keepdim=True)
    return torch.where(is_far.any(1, keepdim=True), mean + (1 - mean.sum(1, keepdim=True)) * centers, mean)
