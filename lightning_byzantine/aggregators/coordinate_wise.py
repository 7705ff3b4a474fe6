"""The base class of rules that treat every coordinate separately."""

from abc import ABC, abstractmethod

from lightning_byzantine.aggregators.aggregator import Aggregator
from lightning_byzantine.matrix import Coordinatewise, Measurement, WorkerMatrix
from lightning_byzantine.matrix.compiled import Compiled
from lightning_byzantine.matrix.order_statistics import MeanOfRanks

__all__ = ["CoordinateWise"]


class CoordinateWise(Aggregator, ABC):
    """In every coordinate, the mean of the values at certain ranks among the sorted m.

    Args:
        compile: whether to use `torch.compile`, which needs a C++ compiler on CPUs and Triton on GPUs. The result is
            bit-identical; the first step takes seconds longer, and the others are faster.

    Raises:
        TypeError: if ``compile`` is neither True nor False.
        RuntimeError: in the first step, if ``compile`` is True and `torch.compile` finds no compiler.

    Example:
        >>> import torch
        >>> class Midrange(CoordinateWise):
        ...     def ranks(self, num_workers: int, num_byzantine: int) -> tuple[int, ...]:
        ...         return (num_byzantine, num_workers - num_byzantine - 1)
        >>> Midrange()(torch.tensor([[1.0], [2.0], [5.0], [6.0], [90.0]]), num_byzantine=1)
        tensor([4.])

    """

    def __init__(self, compile: bool = False) -> None:
        super().__init__()
        if not isinstance(compile, bool):
            raise TypeError(f"compile must be True or False, got {compile!r}")
        self.is_compiled = compile  # `compile` is a method of torch.nn.Module

    def extra_repr(self) -> str:
        """Show ``compile`` in ``repr`` if it is True."""
        return "compile=True" if self.is_compiled else ""

    @abstractmethod
    def ranks(self, num_workers: int, num_byzantine: int) -> tuple[int, ...]:
        """Return the ranks of the values to average, in [0, m); 0 is the smallest value."""

    def locate(self, matrix: WorkerMatrix, num_byzantine: int) -> Coordinatewise:
        """Return the vector of these means."""
        function = MeanOfRanks(self.ranks(matrix.num_workers, num_byzantine))
        if self.is_compiled:
            return matrix.coordinatewise(Compiled(function), overwrites=False)
        return matrix.coordinatewise(function)

    def measure(self, matrix: WorkerMatrix, num_byzantine: int) -> Measurement:
        """Return which rows can be used; if compiled, in the pass that computes the result."""
        if not self.is_compiled:
            return super().measure(matrix, num_byzantine)
        return matrix.measure_and_compute(Compiled(MeanOfRanks(self.ranks(matrix.num_workers, num_byzantine))))
