"""All Byzantine workers copy one honest one."""

from collections.abc import Sequence

from torch import Tensor

from lightning_byzantine.attacks.attack import VectorAttack
from lightning_byzantine.matrix import WorkerMatrix
from lightning_byzantine.utilities.checks import check_integer_at_least

__all__ = ["Mimic"]


class Mimic(VectorAttack):
    """All Byzantine workers send what one honest worker sends, whose data then count too much.

    Nothing in what they send is wrong; it hurts where workers hold different data.

    Args:
        worker: index, among all workers, of the honest one to copy. None for the honest worker of lowest index.

    Source: Karimireddy et al., "Byzantine-Robust Learning on Heterogeneous Datasets via Bucketing", ICLR 2022.

    Example:
        >>> import torch
        >>> Mimic()(torch.tensor([[1.0], [3.0], [5.0]]), byzantine=[0, 2])
        tensor([[3.],
                [3.],
                [3.]])

    """

    def __init__(self, worker: int | None = None) -> None:
        super().__init__()
        if worker is not None:
            check_integer_at_least("worker", worker, 0)
        self.worker = worker
        self._index = 0

    def extra_repr(self) -> str:
        """Show the argument in ``repr``."""
        return f"worker={self.worker}"

    def check(self, num_workers: int, byzantine: Sequence[int]) -> None:
        """Raise :class:`ValueError` when the worker to copy isn't there, or isn't honest."""
        super().check(num_workers, byzantine)
        if self.worker is None:
            return
        if self.worker >= num_workers:
            raise ValueError(f"worker must be in [0, {num_workers}) for {num_workers} workers, got {self.worker}")
        if self.worker in byzantine:
            raise ValueError(
                f"worker must be an honest one, got worker={self.worker} with {sorted(byzantine)} Byzantine"
            )

    def tamper(self, matrix: WorkerMatrix, byzantine: Sequence[int]) -> WorkerMatrix:
        """Return a matrix with copies in the Byzantine rows."""
        honest = [row for row in range(matrix.num_workers) if row not in byzantine]
        self._index = 0 if self.worker is None else honest.index(self.worker)
        return super().tamper(matrix, byzantine)

    def forge(self, honest: Tensor, own: Tensor) -> Tensor:
        """Return the row of the chosen worker, once for each Byzantine worker."""
        return honest[self._index].expand_as(own)
