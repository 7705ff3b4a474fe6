"""The base class of rules that wrap another rule."""

from abc import ABC

from lightning_byzantine.aggregators.aggregator import Aggregator
from lightning_byzantine.aggregators.last_aggregate import LastAggregate
from lightning_byzantine.matrix import WorkerMatrix

__all__ = ["MetaAggregator"]


class MetaAggregator(Aggregator, ABC):
    """A rule that improves on a ``base`` rule.

    Args:
        base: the rule to improve, which may be a meta-aggregator itself.

    Example:
        >>> import torch
        >>> from lightning_byzantine.aggregators import CTMA, NNM, CoordinateWiseMedian
        >>> rule = CTMA(base=NNM(base=CoordinateWiseMedian()))
        >>> rule(torch.tensor([[1.0], [2.0], [3.0], [-90.0]]), num_byzantine=1)
        tensor([2.])

    """

    def __init__(self, base: Aggregator) -> None:
        super().__init__()
        if not isinstance(base, Aggregator):
            raise TypeError(f"base must be an Aggregator, such as CoordinateWiseMedian(), got {base!r}")
        self.base = base
        self.uses_products = self.uses_products or base.uses_products
        self.uses_previous = self.uses_previous or base.uses_previous
        if self.uses_previous:
            self.last_aggregate = LastAggregate()

    def check(self, num_workers: int, num_byzantine: int) -> None:
        """Raise :class:`ValueError` if the rule or its base does not support m workers of which f are Byzantine."""
        super().check(num_workers, num_byzantine)
        self.base.check(num_workers, num_byzantine)

    def segmented(self, matrix: WorkerMatrix) -> WorkerMatrix:
        """Return the same rows, of a plain tensor with the segments that the base was told of."""
        return self.base.segmented(matrix)
