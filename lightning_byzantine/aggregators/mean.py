"""The rule of stock DDP."""

from lightning_byzantine.aggregators.aggregator import Aggregator
from lightning_byzantine.matrix import Point, WorkerMatrix

__all__ = ["Mean"]


class Mean(Aggregator):
    """(1/m) sum_i x_i: what DDP computes. One finite Byzantine row is enough to move it anywhere.

    Example:
        >>> import torch
        >>> Mean()(torch.tensor([[1.0], [2.0], [6.0]]), num_byzantine=0)
        tensor([3.])

    """

    def locate(self, matrix: WorkerMatrix, num_byzantine: int) -> Point:
        """Return the average of all rows."""
        return matrix.mean()
