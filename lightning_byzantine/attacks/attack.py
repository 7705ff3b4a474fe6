"""The base classes of attacks: on the vectors that workers send, and on the data they train on."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from lightning_byzantine.aggregators.aggregator import Aggregator
from lightning_byzantine.matrix import WorkerMatrix
from lightning_byzantine.utilities.checks import check_vectors, check_worker_indices
from lightning_byzantine.utilities.showing_arguments import ShowsArguments

__all__ = ["Attack", "DataAttack", "VectorAttack"]


class Attack(ShowsArguments, ABC):
    """What Byzantine workers do. A module, so that the state it keeps between steps is in its ``state_dict``.

    To write one, subclass :class:`VectorAttack` or :class:`DataAttack`.

    Attributes:
        on_vectors: whether :meth:`tamper` changes what workers send.
        on_data: whether :meth:`poison` changes the data they train on.

    """

    on_vectors: bool = False
    on_data: bool = False

    def check(self, num_workers: int, byzantine: Sequence[int]) -> None:
        """Raise :class:`ValueError` if these workers can't run the attack."""
        check_worker_indices("workers", byzantine, num_workers)

    def bind(self, aggregator: Aggregator, num_byzantine: int) -> None:
        """Receive the rule in use and the f that it is called with; neither the rule nor its state may be changed."""

    def tamper(self, matrix: WorkerMatrix, byzantine: Sequence[int]) -> WorkerMatrix:
        """Return a matrix with forged Byzantine rows, the same on every rank; ``matrix`` is not written to."""
        return matrix

    def poison(self, batch: Any) -> Any:
        """Return the poisoned batch; ``batch`` itself is not written to.

        In training, every rank calls this with each of its batches, so that the attack's state is the same on all
        of them; only Byzantine workers train on the result.
        """
        return batch

    @torch.no_grad()
    def forward(self, vectors: Tensor, byzantine: Sequence[int]) -> Tensor:
        """Forge rows of a plain tensor.

        Args:
            vectors: [m, d], what the workers would send if all were honest. Not written to.
            byzantine: indices of the Byzantine workers.

        Returns:
            [m, d], in the dtype and on the device of ``vectors``.

        Raises:
            TypeError: if ``vectors`` is not a floating-point tensor, or this is an attack on data.
            ValueError: if ``vectors`` is not 2D or is empty, an index is out of range, or no worker is left honest.

        """
        if not self.on_vectors:
            raise TypeError(f"{type(self).__name__} attacks batches, not vectors: call its `poison`")
        check_vectors(vectors)
        self.check(vectors.shape[0], byzantine)
        return self.tamper(WorkerMatrix([vectors]), byzantine).blocks[0]


class DataAttack(Attack):
    """An attack on a Byzantine worker's own batches: it follows the protocol, but trains on poisoned data.

    Example:
        >>> class Blank(DataAttack):
        ...     def poison(self, batch: Any) -> Any:
        ...         images, labels = batch
        ...         return torch.zeros_like(images), labels
        >>> Blank().poison((torch.ones(2), torch.tensor([3, 4])))
        (tensor([0., 0.]), tensor([3, 4]))

    """

    on_data = True

    @abstractmethod
    def poison(self, batch: Any) -> Any:
        """Return the poisoned batch; ``batch`` itself is not written to."""


class VectorAttack(Attack):
    """An attack on the vectors that Byzantine workers send, with full knowledge of what the honest ones send.

    To write one, override :meth:`forge` if each column can be forged on its own; otherwise override :meth:`tamper`,
    which gets the whole matrix and its statistics.

    Example:
        >>> class Cautious(VectorAttack):
        ...     def forge(self, honest: Tensor, own: Tensor) -> Tensor:
        ...         return honest.min(dim=0).values.expand_as(own)
        >>> Cautious()(torch.tensor([[1.0, 2.0], [3.0, 4.0], [5.0, 0.0]]), byzantine=[0])
        tensor([[3., 0.],
                [3., 4.],
                [5., 0.]])

    """

    on_vectors = True

    def forge(self, honest: Tensor, own: Tensor) -> Tensor:
        """Return what the Byzantine workers send, for one block of columns.

        Args:
            honest: [m - f, c], the honest rows, float32 or float64.
            own: [f, c], what the Byzantine workers would send if they were honest.

        Returns:
            [f, c].

        """
        raise NotImplementedError(f"{type(self).__name__} must override forge, or tamper")

    def tamper(self, matrix: WorkerMatrix, byzantine: Sequence[int]) -> WorkerMatrix:
        """Return a matrix with forged Byzantine rows, the same on every rank; ``matrix`` is not written to."""
        return forge_rows(matrix, byzantine, self.forge)


def honest_workers(matrix: WorkerMatrix, byzantine: Sequence[int]) -> list[int]:
    """Return the indices of the other workers, in order."""
    return [worker for worker in range(matrix.num_workers) if worker not in byzantine]


def forge_rows(matrix: WorkerMatrix, rows: Sequence[int], forge: Callable[[Tensor, Tensor], Tensor]) -> WorkerMatrix:
    """Return a matrix with the Byzantine rows replaced by ``forge(honest, own)``.

    Args:
        matrix: not written to.
        rows: the f rows to replace.
        forge: called for each block of columns, as :meth:`VectorAttack.forge`.

    """

    def forge_in_float32(honest: Tensor, own: Tensor) -> Tensor:
        dtype = torch.promote_types(own.dtype, torch.float32)
        return forge(honest.to(dtype), own.to(dtype))

    return replace_rows(matrix, rows, forge_in_float32)


def replace_rows(matrix: WorkerMatrix, rows: Sequence[int], forge: Callable[[Tensor, Tensor], Tensor]) -> WorkerMatrix:
    """Do what :func:`forge_rows` does, but call ``forge`` with rows in the dtype of the block."""
    honest, own = honest_workers(matrix, rows), sorted(rows)

    def replaced(block: Tensor) -> Tensor:
        result = block.clone()
        result[own] = forge(block[honest], block[own]).to(block.dtype)
        return result

    return matrix.map_blocks(replaced)
