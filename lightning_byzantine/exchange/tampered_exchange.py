"""An exchange in which some workers lie, as far as anybody can see."""

from collections.abc import Callable

from torch import Tensor

from lightning_byzantine.exchange.exchange import Exchange
from lightning_byzantine.matrix import Names, WorkerMatrix

__all__ = ["TamperedExchange"]


class TamperedExchange:
    """Another exchange, whose matrix is tampered with on every rank alike.

    Args:
        exchange: what brings the vectors together.
        tamper: returns the matrix in which the Byzantine rows are forged.

    """

    def __init__(self, exchange: Exchange, tamper: Callable[[WorkerMatrix], WorkerMatrix]) -> None:
        self._exchange = exchange
        self._tamper = tamper

    @property
    def rank(self) -> int:
        """This process."""
        return self._exchange.rank

    def allocate(self, num_rows: int, num_columns: int, like: Tensor) -> Tensor:
        """Return memory of the exchange."""
        return self._exchange.allocate(num_rows, num_columns, like)

    def start(self, rows: Tensor, names: Names = ()) -> None:
        """Begin to send one block."""
        self._exchange.start(rows, names)

    def finish(self) -> WorkerMatrix:
        """Return the matrix with forged rows."""
        return self._tamper(self._exchange.finish())

    def own_columns(self, wholes: list[Tensor]) -> list[Tensor]:
        """Return the part of whole blocks that the matrix has the columns of."""
        return self._exchange.own_columns(wholes)

    def collect(self, parts: list[Tensor]) -> list[Tensor]:
        """Return whole blocks."""
        return self._exchange.collect(parts)
