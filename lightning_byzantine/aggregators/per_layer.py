"""A decision in each parameter."""

from collections.abc import Sequence

from lightning_byzantine.aggregators.aggregator import Aggregator
from lightning_byzantine.aggregators.meta_aggregator import MetaAggregator
from lightning_byzantine.aggregators.persistent_filter import PersistentFilter
from lightning_byzantine.matrix import Measurement, Point, Segments, WorkerMatrix
from lightning_byzantine.utilities.checks import check_integer_at_least

__all__ = ["PerLayer"]


class PerLayer(MetaAggregator):
    """The base rule in each parameter tensor on its own.

    Distances between whole vectors of d values have room for sqrt(d) honest standard deviations, which an attacker may
    spend on a single layer. In that layer alone, such rows are far from the others.

    Tensors of fewer than 100 elements, such as biases, belong to the one before. Inner products in all tensors are
    computed in one pass, with one sum over the ranks of a sharded exchange; a base that needs more of them needs more
    for each tensor.

    Args:
        base: the rule for each tensor; neither :class:`PersistentFilter` nor this rule, which decide in each tensor
            themselves.
        sizes: number of columns of each tensor, from left to right, for calls on plain tensors. None to take all
            columns for one tensor there. In training, the model's parameters are used.

    Example:
        >>> import torch
        >>> from lightning_byzantine.aggregators import Krum
        >>> vectors = torch.tensor([[1.0, 9.0], [1.5, 1.0], [9.0, 1.5], [2.5, 2.5]]).repeat_interleave(100, dim=1)
        >>> Krum()(vectors, num_byzantine=1)[::100]
        tensor([2.5000, 2.5000])
        >>> PerLayer(Krum(), sizes=[100, 100])(vectors, num_byzantine=1)[::100]
        tensor([1.5000, 1.5000])

    """

    def __init__(self, base: Aggregator, sizes: Sequence[int] | None = None) -> None:
        super().__init__(base)
        for rule in base.modules():
            if isinstance(rule, PerLayer | PersistentFilter):
                name = type(rule).__name__
                raise ValueError(f"base must not be {name} nor contain it: it decides in each parameter itself")
        if isinstance(sizes, Sequence):
            sizes = [check_integer_at_least("each of sizes", size, 1) for size in sizes]
        elif sizes is not None:
            raise TypeError(f"sizes must be a list of integers, got {sizes!r}")
        self.sizes = sizes

    def segmented(self, matrix: WorkerMatrix) -> WorkerMatrix:
        """Return the same rows, of a plain tensor with segments of the sizes that were given.

        Raises:
            ValueError: if the sizes don't add up to the number of columns.

        """
        if self.sizes is None or matrix.segments is not None:
            return matrix
        return matrix.with_segments(Segments.of_sizes(self.sizes, [block.shape[1] for block in matrix.blocks]))

    def measure(self, matrix: WorkerMatrix, num_byzantine: int) -> Measurement:
        """Return which rows can be used."""
        return matrix.measure(from_products=self.uses_products, split=self.uses_products)

    def locate(self, matrix: WorkerMatrix, num_byzantine: int) -> Point:
        """Return the base's results in all tensors."""
        parts = matrix.split(with_products=self.uses_products)
        return matrix.join([self.base.locate(part, num_byzantine) for part in parts.values()])
