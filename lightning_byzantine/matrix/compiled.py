"""Selection networks compiled into one kernel, instead of one operation for each comparison."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor

from lightning_byzantine.matrix.column_function import ColumnFunction
from lightning_byzantine.matrix.order_statistics import MeanOfRanks
from lightning_byzantine.utilities.torch_internals import BackendCompilerFailed, separate_symbols

__all__ = ["Compiled"]

# With fewer columns, the call of a kernel takes longer than eager mode, and `torch.compile` specializes on 1.
_FEW = 4096

_Kernel = Callable[[list[Tensor]], tuple[Tensor, Tensor]]


@dataclass(frozen=True)
class Compiled(ColumnFunction):
    """A compiled function of every column: bit-identical, but faster.

    A process compiles once for each function, number of rows and dtype, for any number of columns.

    Args:
        function: the function to compile.

    Raises:
        RuntimeError: in a call, if `torch.compile` does not work here.

    Example:
        >>> Compiled(MeanOfRanks((1,)))(torch.tensor([[3.0, 1.0], [1.0, 1.0], [2.0, 9.0]]))
        tensor([2., 1.])

    """

    function: MeanOfRanks

    def __call__(self, rows: Tensor) -> Tensor:
        """Map m rows [m, c], without writing to them, to [c] in the dtype of the function's result."""
        return self.with_squares(rows)[0]

    @property
    def eager(self) -> MeanOfRanks:
        """The function that is not compiled."""
        return self.function

    def with_squares(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        """Return the same, and the sum of squares of all rows: a float64 scalar, finite only if all rows are."""
        if rows.shape[1] < _FEW:
            return self.function(rows.to(_widened(rows.dtype), copy=True)), rows.double().square().sum()
        kernel = _kernel(self.function, len(rows), rows.dtype)
        try:
            # Otherwise `torch.compile` would recompile for each kind of view and each grad mode, and where a stride, an
            # offset and a length happen to be equal.
            with torch.no_grad(), separate_symbols():
                return kernel([row.data for row in rows])
        except BackendCompilerFailed as error:
            raise RuntimeError(
                "compile=True needs what torch.compile needs: on CPUs a C++ compiler, such as g++ or what the"
                " environment variable CXX names, and on GPUs Triton. Install it, or leave compile=True out."
            ) from error


@cache
def _kernel(function: MeanOfRanks, num_rows: int, dtype: torch.dtype) -> _Kernel:
    def kernel(rows: list[Tensor]) -> tuple[Tensor, Tensor]:
        values = [rows[row].to(_widened(dtype)) for row in range(num_rows)]
        squares = sum((value * value for value in values[1:]), start=values[0] * values[0])
        return function.unrolled(values), squares.sum(dtype=torch.float64)

    # Unrolled here, because `torch.compile` would take many times longer, and with a separate code object for each
    # kernel, because it limits recompilations per code object.
    unrolled = torch.fx.symbolic_trace(kernel)
    return torch.compile(unrolled, dynamic=True, fullgraph=True)


def _widened(dtype: torch.dtype) -> torch.dtype:
    return torch.promote_types(dtype, torch.float32)
