"""The exchange of a single process."""

from torch import Tensor

from lightning_byzantine.exchange.kept_memory import KeptMemory
from lightning_byzantine.matrix import Names, WorkerMatrix

__all__ = ["SingleRank"]


class SingleRank:
    """All workers are this process's own, so nothing is sent and no process group is needed.

    Example:
        >>> import torch
        >>> exchange = SingleRank()
        >>> exchange.start(torch.tensor([[1.0, 2.0]]))
        >>> exchange.finish().num_workers
        1

    """

    rank = 0

    def __init__(self) -> None:
        self._started: list[tuple[Tensor, Names]] = []
        self._memory = KeptMemory()

    def allocate(self, num_rows: int, num_columns: int, like: Tensor) -> Tensor:
        """Return kept memory."""
        return self._memory.get(len(self._started), like, num_rows, num_columns)

    def start(self, rows: Tensor, names: Names = ()) -> None:
        """Take one block."""
        self._started.append((rows, names))

    def finish(self) -> WorkerMatrix:
        """Return the rows as they are."""
        started, self._started = self._started, []
        self._memory.keep(len(started))
        return WorkerMatrix([rows for rows, _ in started], layout=tuple(names for _, names in started))

    def own_columns(self, wholes: list[Tensor]) -> list[Tensor]:
        """Return all columns."""
        return wholes

    def collect(self, parts: list[Tensor]) -> list[Tensor]:
        """Return the parts, which are whole."""
        return parts
