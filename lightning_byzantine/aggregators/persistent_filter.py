"""A filter of what deviates step after step; the default rule."""

import torch
from torch import Tensor

from lightning_byzantine.aggregators.aggregator import Aggregator
from lightning_byzantine.aggregators.histories import Histories, History
from lightning_byzantine.aggregators.loud_directions import (
    medians_of_products,
    middle_of,
    squared_distances_from,
    standing_out,
)
from lightning_byzantine.matrix import Measurement, Point, WorkerMatrix

__all__ = ["PersistentFilter"]

# Averages are over about the last 50 steps.
_LONGEST_MEMORY = 0.98
# A squared deviation counts for at most this many usual ones, so that a single step is forgotten.
_MOST = 100.0
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
        centers = medians_of_products(products)
        deviations = _about(products, centers)
        kept = torch.stack(
            [
                self._keep(self.histories.of(name, matrix.num_offered), matrix.workers, of_part, num_byzantine)
                for name, of_part in zip(parts, deviations, strict=True)
            ]
        )
        weights = _clipped(products, kept, num_byzantine)
        return matrix.join([part.combine(of_part) for part, of_part in zip(parts.values(), weights, strict=True)])

    def _keep(self, history: History, workers: Tensor, products: Tensor, num_byzantine: int) -> Tensor:
        """Return which rows to keep, [n] bool, and add those of this step to the history."""
        _update(history, workers, products)
        kept = ~standing_out(history.products[workers][:, workers], num_byzantine)
        squares = history.squares[workers]
        # Those that are far away in all directions, also if a few of them only are.
        farthest = squares.argsort(descending=True, stable=True)[:num_byzantine]
        kept[farthest[squares[farthest] > _FAR]] = False
        return kept


def _update(history: History, workers: Tensor, products: Tensor) -> None:
    squares = products.diagonal().clamp(min=0)
    usual = middle_of(squares)
    if usual > 0:
        # No step counts more than a usual one, or a single large lie would hide what comes after it.
        shares = (usual / squares).sqrt().clamp(max=1)
        seen = products * shares * shares[:, None] / usual
        sizes = (squares / usual).clamp(max=_MOST)
    else:
        seen, sizes = torch.zeros_like(products), torch.where(squares > 0, _MOST, 0.0)
    memory = min(_LONGEST_MEMORY, history.num_steps / (history.num_steps + 1))
    history.num_steps += 1
    pairs = (workers[:, None], workers)
    history.products[pairs] = torch.lerp(seen, history.products[pairs], memory)
    history.squares[workers] = torch.lerp(sizes, history.squares[workers], memory)


def _about(products: Tensor, weights: Tensor) -> Tensor:
    """Return inner products [.., m, m] about the point sum_i w_i x_i."""
    seen = products @ weights[..., None]
    return products - seen - seen.mT + weights[..., None, :] @ seen


def _clipped(products: Tensor, kept: Tensor, num_byzantine: int) -> Tensor:
    """Return the weights of the mean of the kept rows, clipped to a ball around their geometric median, [s, m]."""
    num_honest = products.shape[-1] - num_byzantine
    weights = []
    for of_part, rows in zip(products, kept, strict=True):
        indices = rows.nonzero().flatten()
        center = torch.zeros(len(rows), dtype=torch.float64)
        center[indices] = medians_of_products(of_part[indices][:, indices])
        distances = squared_distances_from(of_part, center).sqrt()[indices]
        radius = _SLACK * distances.kthvalue(num_honest).values
        mean = torch.zeros_like(center)
        mean[indices] = torch.where(distances > radius, radius / distances, 1.0) / len(indices)
        is_clipped = bool((distances > radius).any())
        weights.append(mean + (1 - mean.sum()) * center if is_clipped else mean)
    return torch.stack(weights)
