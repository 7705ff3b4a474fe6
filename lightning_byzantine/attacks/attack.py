"""The two kinds of attack: on what a worker sends, and on the data it learns from."""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from lightning_byzantine.checks import check_vectors, check_worker_indices
from lightning_byzantine.matrix import WorkerMatrix

__all__ = ["Attack", "DataAttack", "VectorAttack"]


class Attack(nn.Module, ABC):
    """What Byzantine workers do. A module, so that what it keeps between steps is in its ``state_dict``.

    To write one, subclass :class:`VectorAttack` or :class:`DataAttack`.
    """

    def check(self, num_workers: int, byzantine: Sequence[int]) -> None:
        """Raise :class:`ValueError` when the attack can't be run by these workers."""
        check_worker_indices("workers", byzantine, num_workers)


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

    @abstractmethod
    def poison(self, batch: Any) -> Any:
        """Return the poisoned batch; ``batch`` itself is not written to."""


class VectorAttack(Attack):
    """An attack on the vectors that Byzantine workers send, with full sight of what the honest ones send.

    Example:
        >>> class Mimic(VectorAttack):
        ...     def forge(self, honest: Tensor, own: Tensor) -> Tensor:
        ...         return honest[0].expand_as(own)
        >>> Mimic()(torch.tensor([[1.0, 2.0], [3.0, 4.0], [5.0, 6.0]]), byzantine=[0, 2])
        tensor([[3., 4.],
                [3., 4.],
                [3., 4.]])

    """

    @abstractmethod
    def forge(self, honest: Tensor, own: Tensor) -> Tensor:
        """Return what the Byzantine workers send, for one block of columns.

        Args:
            honest: [m - f, c], the honest rows, float32 or float64.
            own: [f, c], what the Byzantine workers would send if they were honest.

        Returns:
            [f, c].

        """

    def tamper(self, matrix: WorkerMatrix, byzantine: Sequence[int]) -> WorkerMatrix:
        """Return a matrix with the Byzantine rows forged, the same on every rank; ``matrix`` is not written to."""
        return matrix.map_blocks(lambda block: self._forge_rows(block, byzantine))

    @torch.no_grad()
    def forward(self, vectors: Tensor, byzantine: Sequence[int]) -> Tensor:
        """Forge rows of a plain tensor.

        Args:
            vectors: [m, d], what the workers would send if all were honest. Not written to.
            byzantine: indices of the Byzantine workers.

        Returns:
            [m, d], in the dtype and on the device of ``vectors``.

        Raises:
            TypeError: if ``vectors`` is not a floating-point tensor.
            ValueError: if ``vectors`` is not 2D or is empty, or an index is out of range, or none is left honest.

        """
        check_vectors(vectors)
        self.check(vectors.shape[0], byzantine)
        return self.tamper(WorkerMatrix([vectors]), byzantine).blocks[0]

    def _forge_rows(self, block: Tensor, byzantine: Sequence[int]) -> Tensor:
        rows = block.to(torch.promote_types(block.dtype, torch.float32))
        is_byzantine = torch.zeros(len(block), dtype=torch.bool, device=block.device)
        is_byzantine[list(byzantine)] = True
        forged = block.clone()
        forged[is_byzantine] = self.forge(rows[~is_byzantine], rows[is_byzantine]).to(block.dtype)
        return forged
