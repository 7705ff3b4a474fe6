"""The mean of the rows around a trusted one."""

from lightning_byzantine.aggregators.aggregator import Aggregator
from lightning_byzantine.errors import ReferenceLostError
from lightning_byzantine.matrix import Point, WorkerMatrix, mean_of
from lightning_byzantine.utilities.checks import check_integer_at_least

__all__ = ["MoNNA"]


class MoNNA(Aggregator):
    """The mean of the m - f rows nearest to that of a trusted worker, itself included.

    In the paper every node trusts itself and keeps a model of its own. Ranks of data-parallel training share one model,
    so they must trust the same worker. It must be honest, because it decides the result.

    Args:
        reference: index of the trusted worker. Random buckets belong to no worker, so :class:`Bucketing` refuses this
            rule as its base.

    Source: Farhadkhani et al., "Robust Collaborative Learning with Linear Gradient Overhead", ICML 2023.

    Example:
        >>> import torch
        >>> MoNNA(reference=1)(torch.tensor([[9.0], [1.0], [2.0]]), num_byzantine=1)
        tensor([1.5000])

    """

    uses_products = True

    def __init__(self, reference: int = 0) -> None:
        super().__init__()
        self.reference = check_integer_at_least("reference", reference, 0)

    def check(self, num_workers: int, num_byzantine: int) -> None:
        """Raise :class:`ValueError` if there is no worker ``reference``."""
        super().check(num_workers, num_byzantine)
        if self.reference >= num_workers:
            raise ValueError(
                f"reference must be the index of one of m={num_workers} workers, got reference={self.reference}"
            )

    def locate(self, matrix: WorkerMatrix, num_byzantine: int) -> Point:
        """Return the average of the rows nearest to the reference's.

        Raises:
            ReferenceLostError: if the reference's row was dropped.

        """
        is_reference = (matrix.workers == self.reference).double()
        if not is_reference.any():
            raise ReferenceLostError([self.reference], matrix.num_workers, num_byzantine)
        kept = matrix.nearest(matrix.combine(is_reference), matrix.num_workers - num_byzantine)
        return matrix.combine(mean_of(kept, matrix.num_workers))
