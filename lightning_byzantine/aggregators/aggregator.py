"""The base class of aggregation rules."""

from abc import ABC, abstractmethod

import torch
from torch import Tensor

from lightning_byzantine.aggregators.decision import Decision
from lightning_byzantine.aggregators.last_aggregate import LastAggregate
from lightning_byzantine.errors import ByzantineBreakdownError
from lightning_byzantine.matrix import Measurement, Point, WorkerMatrix
from lightning_byzantine.utilities.checks import check_num_byzantine, check_vectors
from lightning_byzantine.utilities.showing_arguments import ShowsArguments

__all__ = ["Aggregator"]


class Aggregator(ShowsArguments, ABC):
    """A rule A(x_1, .., x_m; f) -> R^d that withstands f < m / 2 Byzantine rows.

    A subclass implements :meth:`locate` on a :class:`~lightning_byzantine.matrix.WorkerMatrix`, and then works on plain
    tensors and on DDP's buckets. It is a :class:`torch.nn.Module` without parameters, so that the ``state_dict`` of a
    composition includes the state of every rule in it.

    Attributes:
        uses_products: whether the rule or its base needs the rows' inner products, which also give their norms.
        uses_previous: whether the rule or its base starts from the previous aggregate,
            :attr:`~lightning_byzantine.matrix.WorkerMatrix.previous`. The strategy saves it in checkpoints; on plain
            tensors, it is in the ``state_dict`` of the rule that is called.

    Example:
        >>> class FirstRow(Aggregator):
        ...     def locate(self, matrix: WorkerMatrix, num_byzantine: int) -> Point:
        ...         return matrix.combine(torch.eye(matrix.num_workers)[0])
        >>> FirstRow()(torch.tensor([[torch.nan, 1.0], [2.0, 3.0], [4.0, 5.0]]), num_byzantine=1)
        tensor([2., 3.])

    """

    uses_products: bool = False
    uses_previous: bool = False

    def __init__(self) -> None:
        super().__init__()
        if self.uses_previous:
            self.last_aggregate = LastAggregate()

    def reset(self) -> None:
        """Return to the state before the first call, in training."""
        for rule in self.children():
            if isinstance(rule, Aggregator):
                rule.reset()
        if self.uses_previous:
            self.last_aggregate.clear()

    @abstractmethod
    def locate(self, matrix: WorkerMatrix, num_byzantine: int) -> Point:
        """Return the rule's result, lazily; all rows are finite, and 0 <= f < m / 2."""

    def check(self, num_workers: int, num_byzantine: int) -> None:
        """Raise :class:`ValueError` if the rule does not support m workers of which f are Byzantine."""
        check_num_byzantine(num_byzantine, num_workers)

    def segmented(self, matrix: WorkerMatrix) -> WorkerMatrix:
        """Return the same rows, of a plain tensor with the segments that the rule or its base was told of."""
        return matrix

    def measure(self, matrix: WorkerMatrix, num_byzantine: int) -> Measurement:
        """Return which rows can be used, computed in a pass that the rule needs anyway if there is one."""
        return matrix.measure(from_products=self.uses_products)

    def aggregate(self, matrix: WorkerMatrix, num_byzantine: int) -> list[Tensor]:
        """Drop non-finite rows, then apply the rule to the others.

        A row with a non-finite entry or an overflowing squared norm always counts as Byzantine: it is dropped, and
        ``num_byzantine`` is reduced by one.

        Args:
            matrix: m rows, in any number of column blocks.
            num_byzantine: f.

        Returns:
            One [c_b] tensor for each block, in its dtype.

        Raises:
            ValueError: if the rule does not support m and f.
            ByzantineBreakdownError: if more than f rows were dropped.

        """
        return self.decide(matrix, num_byzantine).values()

    def decide(self, matrix: WorkerMatrix, num_byzantine: int) -> Decision:
        """Do what :meth:`aggregate` does, with the same errors, but without computing the result yet."""
        num_workers = matrix.num_workers
        self.check(num_workers, num_byzantine)
        matrix = self.segmented(matrix)
        measured = self.measure(matrix, num_byzantine)
        rows = measured.is_measurable.nonzero().flatten()
        if len(rows) == num_workers:
            point = self.locate(matrix, num_byzantine) if measured.point is None else measured.point
            return Decision(matrix, measured, matrix, point, num_byzantine)
        dropped = matrix.workers[~measured.is_measurable].tolist()
        if len(dropped) > num_byzantine:
            raise ByzantineBreakdownError(dropped, num_workers, num_byzantine)
        seen, num_left = matrix.select(rows), num_byzantine - len(dropped)
        return Decision(matrix, measured, seen, self.locate(seen, num_left), num_left)

    @torch.no_grad()
    def forward(self, vectors: Tensor, num_byzantine: int) -> Tensor:
        """Aggregate a plain tensor.

        Args:
            vectors: [m, d], one row per worker; float16, bfloat16, float32 or float64, on any device. Not written to.
            num_byzantine: f, with 0 <= f < m / 2.

        Returns:
            [d], in the dtype and on the device of ``vectors``.

        Raises:
            TypeError: if ``vectors`` is not a floating-point tensor, or ``num_byzantine`` not an integer.
            ValueError: if ``vectors`` is not 2D or is empty, or the rule does not support m and f; if it
                ``uses_previous`` and d differs from that of the previous call.
            ByzantineBreakdownError: if more than f rows are non-finite or overflow.

        """
        check_vectors(vectors)
        matrix = WorkerMatrix([vectors])
        if self.uses_previous:
            matrix = matrix.with_previous(self.last_aggregate.blocks_for(vectors))
        aggregate = self.aggregate(matrix, num_byzantine)[0]
        if self.uses_previous:
            self.last_aggregate.keep(aggregate)
        return aggregate
