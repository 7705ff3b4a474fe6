"""What all exchanges have in common: from the vectors of a process's own workers to the matrix of all workers."""

from typing import Protocol

from torch import Tensor

from lightning_byzantine.matrix import Names, WorkerMatrix

__all__ = ["Exchange"]


class Exchange(Protocol):
    """One exchange a step: :meth:`start` for every block of the workers' vectors, :meth:`finish`, :meth:`collect`.

    Memory is kept from step to step: what :meth:`allocate` and :meth:`collect` return, and the matrix, are overwritten
    by the next step's exchange.
    """

    @property
    def rank(self) -> int:
        """This process, whose k workers are those from k times the rank on."""

    def allocate(self, num_rows: int, num_columns: int, like: Tensor) -> Tensor:
        """Return memory [k, c] for the next block to start, so that it need not be copied; it is not initialised.

        Args:
            num_rows: k.
            num_columns: c.
            like: any tensor of the block's dtype and device.

        """

    def start(self, rows: Tensor, names: Names = ()) -> None:
        """Begin to send one block.

        Args:
            rows: [k, c], of the k workers that this process acts as, the same number on all ranks. Must not be written
                to before :meth:`collect` has returned.
            names: the parameters that make up the columns.

        """

    def finish(self) -> WorkerMatrix:
        """Return all blocks as a matrix, in the order they were started; they may still be arriving.

        Rows go by rank, and within a rank as they were sent. They may be overwritten by :meth:`collect`.
        """

    def own_columns(self, wholes: list[Tensor]) -> list[Tensor]:
        """Return the part of whole blocks [c] that this rank's matrix has the columns of."""

    def collect(self, parts: list[Tensor]) -> list[Tensor]:
        """Turn what this rank made of the matrix's blocks into whole blocks [c], the same on every rank."""
