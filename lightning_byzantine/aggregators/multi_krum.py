"""The mean of the rows that Krum scores best."""

from lightning_byzantine.aggregators.aggregator import Aggregator
from lightning_byzantine.aggregators.krum import best_scored
from lightning_byzantine.matrix import Point, WorkerMatrix, mean_of
from lightning_byzantine.utilities.checks import check_integer_at_least

__all__ = ["MultiKrum"]


class MultiKrum(Aggregator):
    """The mean of the ``num_selected`` rows with the lowest Krum scores.

    Args:
        num_selected: how many rows to average, at most m - f. None for m - f.

    Source: Blanchard et al., "Machine Learning with Adversaries: Byzantine Tolerant Gradient Descent", NeurIPS 2017.

    Example:
        >>> import torch
        >>> MultiKrum()(torch.tensor([[1.0], [1.5], [9.0], [3.5]]), num_byzantine=1)
        tensor([2.])

    """

    uses_products = True

    def __init__(self, num_selected: int | None = None) -> None:
        super().__init__()
        self.num_selected = None if num_selected is None else check_integer_at_least("num_selected", num_selected, 1)

    def check(self, num_workers: int, num_byzantine: int) -> None:
        """Raise :class:`ValueError` if ``num_selected`` is more than m - f."""
        super().check(num_workers, num_byzantine)
        if self.num_selected is not None and self.num_selected > num_workers - num_byzantine:
            raise ValueError(
                f"num_selected must be at most m - f, got num_selected={self.num_selected}"
                f" with m={num_workers} workers and f={num_byzantine}"
            )

    def locate(self, matrix: WorkerMatrix, num_byzantine: int) -> Point:
        """Return the average of the rows with the lowest scores."""
        # Under Bucketing, fewer rows may be left after some were dropped.
        count = min(self.num_selected or matrix.num_workers, matrix.num_workers - num_byzantine)
        return matrix.combine(mean_of(best_scored(matrix, num_byzantine, count), matrix.num_workers))
