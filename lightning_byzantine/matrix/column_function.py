"""Functions of every column that keep ties."""

from abc import ABC, abstractmethod

from torch import Tensor

__all__ = ["ColumnFunction"]


class ColumnFunction(ABC):
    """A function of the m values of every column, which rounding of its result keeps from no tie.

    Distances from the result tie by index where they are equal but for rounding, so the result must be known to more
    digits than float32 has: given float32 rows, the function returns what it would return for the same rows in float64.

    Attributes:
        jumps: whether a small change of the rows may change the result much. Means of rows, which are rounded, are then
            given in float64.

    Example:
        >>> import torch
        >>> class Midrange(ColumnFunction):
        ...     def __call__(self, rows: Tensor) -> Tensor:
        ...         return (rows.amin(0).double() + rows.amax(0).double()) / 2
        >>> Midrange()(torch.tensor([[1.0], [2.0], [6.0]]))
        tensor([3.5000], dtype=torch.float64)

    """

    jumps: bool = False

    @abstractmethod
    def __call__(self, rows: Tensor) -> Tensor:
        """Map m rows [m, c] in float32 or float64 to [c], in float64 unless it is one of the values."""

    @property
    def eager(self) -> "ColumnFunction":
        """The same function without compilation, for rare calls; it may overwrite the rows."""
        return self
