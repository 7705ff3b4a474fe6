"""The interface of exchanges, which turn the vectors of each process into the matrix of all workers."""

from typing import Protocol

from torch import Tensor

from lightning_byzantine.matrix import Names, WorkerMatrix

__all__ = ["Exchange"]


class Exchange(Protocol):
    """Each step calls :meth:`start` for every block of the workers' vectors, :meth:`finish`, then :meth:`collect`.

    Memory is reused: the next step overwrites the matrix, and what :meth:`allocate` and :meth:`collect` returned.
    """

    @property
    def rank(self) -> int:
        """Rank r of this process, which acts as the k workers from r k on."""

    def allocate(self, num_rows: int, num_columns: int, like: Tensor) -> Tensor:
        """Return uninitialized memory [k, c] for the next block, which :meth:`start` then need not copy.

        Args:
            num_rows: k.
            num_columns: c.
            like: any tensor of the block's dtype and device.

        """

    def start(self, rows: Tensor, names: Names = ()) -> None:
        """Start sending one block.

        Args:
            rows: [k, c], of the k workers that this process acts as, the same number on all ranks. Must not be written
                to before :meth:`collect` has returned.
            names: the parameters that make up the columns.

        """

    def finish(self) -> WorkerMatrix:
        """Return all blocks as a matrix, in the order they were started; they may still be arriving.

        Rows are ordered by rank, and within a rank as they were sent. :meth:`collect` may overwrite them.
        """

    def own_columns(self, wholes: list[Tensor]) -> list[Tensor]:
        """Return the columns of whole blocks [c] that this rank's matrix has."""

    def collect(self, parts: list[Tensor]) -> list[Tensor]:
        """Return whole blocks [c], the same on every rank, given the aggregate of this rank's columns."""
