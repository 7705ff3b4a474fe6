"""Copies of one honest worker."""

from collections.abc import Sequence

from lightning_byzantine.attacks.attack import VectorAttack, forge_rows, honest_workers
from lightning_byzantine.matrix import WorkerMatrix
from lightning_byzantine.utilities.checks import check_integer_at_least

__all__ = ["Mimic"]


class Mimic(VectorAttack):
    """All Byzantine workers send what one honest worker sends, so that its data get too much weight.

    Each vector by itself is correct; this does harm where workers hold different data.

    Args:
        worker: index of the honest worker to copy, among all workers. None for the honest worker of lowest index.

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
        self.worker = None if worker is None else check_integer_at_least("worker", worker, 0)

    def check(self, num_workers: int, byzantine: Sequence[int]) -> None:
        """Raise :class:`ValueError` if the worker to copy does not exist or is not honest."""
        super().check(num_workers, byzantine)
        if self.worker is not None and self.worker >= num_workers:
            raise ValueError(f"worker must be in [0, {num_workers}) for {num_workers} workers, got {self.worker}")
        if self.worker in byzantine:
            raise ValueError(
                f"worker must be an honest one, got worker={self.worker} with {sorted(byzantine)} Byzantine"
            )

    def tamper(self, matrix: WorkerMatrix, byzantine: Sequence[int]) -> WorkerMatrix:
        """Return a matrix with copies in the Byzantine rows."""
        copied = 0 if self.worker is None else honest_workers(matrix, byzantine).index(self.worker)
        return forge_rows(matrix, byzantine, lambda honest, own: honest[copied].expand_as(own))
