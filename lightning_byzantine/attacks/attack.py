"""The two kinds of attack: on what a worker sends, and on the data it learns from."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from lightning_byzantine.aggregators.aggregator import Aggregator
from lightning_byzantine.matrix import WorkerMatrix
from lightning_byzantine.utilities.checks import check_vectors, check_worker_indices

__all__ = ["Attack", "DataAttack", "VectorAttack"]


class Attack(nn.Module, ABC):
    """What Byzantine workers do. A module, so that what it keeps between steps is in its ``state_dict``.

    To write one, subclass :class:`VectorAttack` or :class:`DataAttack`.

    Attributes:
        on_vectors: whether :meth:`tamper` changes what workers send.
        on_data: whether :meth:`poison` changes what they learn from.

    """

    on_vectors: bool = False
    on_data: bool = False

    def check(self, num_workers: int, byzantine: Sequence[int]) -> None:
        """Raise :class:`ValueError` when the attack can't be run by these workers."""
        check_worker_indices("workers", byzantine, num_workers)

    def bind(self, aggregator: Aggregator, num_byzantine: int) -> None:
        """Learn which rule is in use, and the f that it is called with; it must not be changed, nor its state."""

    def tamper(self, matrix: WorkerMatrix, byzantine: Sequence[int]) -> WorkerMatrix:
        """Return a matrix with the Byzantine rows forged, the same on every rank; ``matrix`` is not written to."""
        return matrix

    def poison(self, batch: Any) -> Any:
        """Return the poisoned batch; ``batch`` itself is not written to.

        In training, every rank calls this with each of its batches, so that what the attack keeps is the same on all
        of them; only Byzantine workers learn from the result.
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
            ValueError: if ``vectors`` is not 2D or is empty, or an index is out of range, or none is left honest.

        """
        if not self.on_vectors:
            raise TypeError(f"{type(self).__name__} attacks batches, not vectors: call its `poison`")
        check_vectors(vectors)
        self.check(vectors.shape[0], byzantine)
        return self.tamper(WorkerMatrix([vectors]), byzantine).blocks[0]


class DataAttack(Attack):
    """An attack on a Byzantine worker's own batch: it then follows the protocol, with poisoned data.

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
    """An attack on the vectors that Byzantine workers send, with full sight of what the honest ones send.

    To write one, override :meth:`forge` if every column can be forged without a look at the others; otherwise
    :meth:`tamper`, which sees the whole matrix and its statistics.

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
        """Return a matrix with the Byzantine rows forged, the same on every rank; ``matrix`` is not written to."""

        def forge(block: Tensor, is_byzantine: Tensor) -> Tensor:
            rows = block.to(torch.promote_types(block.dtype, torch.float32))
            return self.forge(rows[~is_byzantine], rows[is_byzantine])

        return replace_rows(matrix, byzantine, forge)


def replace_rows(
    matrix: WorkerMatrix, rows: Sequence[int], function: Callable[[Tensor, Tensor], Tensor]
) -> WorkerMatrix:
    """Return a matrix with some rows replaced.

    Args:
        matrix: not written to.
        rows: the k rows to replace.
        function: maps a block [m, c] and a mask [m] of those rows to the new ones, [k, c], in order.

    """

    def replaced(block: Tensor) -> Tensor:
        is_replaced = torch.zeros(len(block), dtype=torch.bool, device=block.device)
        is_replaced[list(rows)] = True
        result = block.clone()
        result[is_replaced] = function(block, is_replaced).to(block.dtype)
        return result

    return matrix.map_blocks(replaced)
