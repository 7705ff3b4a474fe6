"""Partitions of the training images among the workers: at random, or so that workers see different classes."""

import os
from abc import ABC, abstractmethod
from collections.abc import Iterator

import lightning.pytorch as pl
import numpy as np
from torch import Tensor
from torch.utils.data import DistributedSampler

from lightning_byzantine import ByzantineDDPStrategy


class Partition(ABC):
    """Assigns images to workers: the same number to each, and no image to two."""

    @abstractmethod
    def split(self, labels: np.ndarray, num_workers: int, generator: np.random.Generator) -> np.ndarray:
        """Return the indices of each worker's images.

        Args:
            labels: [n], the images' classes.
            num_workers: m.
            generator: a different one in every epoch, for partitions that change with each.

        Returns:
            [m, n // m], indices of images, a row for each worker.

        """


class IID(Partition):
    """All workers draw from the same images, which are reshuffled in every epoch.

    Example:
        >>> IID().split(np.zeros(7), 2, np.random.default_rng(0)).shape
        (2, 3)

    """

    def split(self, labels: np.ndarray, num_workers: int, generator: np.random.Generator) -> np.ndarray:
        """Return a random partition."""
        return _rows(generator.permutation(len(labels)), num_workers)


class LabelSorted(Partition):
    """The images are sorted by class and cut into m equal pieces: a worker sees one class, or a few.

    Example:
        >>> LabelSorted().split(np.array([1, 0, 1, 0]), 2, np.random.default_rng(0))
        array([[1, 3],
               [0, 2]])

    """

    def split(self, labels: np.ndarray, num_workers: int, generator: np.random.Generator) -> np.ndarray:
        """Return the same partition in every epoch."""
        return _rows(np.argsort(labels, kind="stable"), num_workers)


class Dirichlet(Partition):
    """Worker i draws images with its own class proportions, q_i ~ Dirichlet(alpha, ..., alpha).

    Images are drawn without replacement. If a class is used up, a worker takes more of its other classes, in
    proportion.

    Args:
        alpha: above 0. At 0.1, most of a worker's images are of one class; larger values make workers more alike.
        seed: random seed; the partition is the same in every epoch.

    Source: Hsu et al., "Measuring the Effects of Non-Identical Data Distribution for Federated Visual Classification"
    (arXiv 1909.06335).

    Example:
        >>> Dirichlet(alpha=0.5).split(np.arange(40) % 10, 4, np.random.default_rng(0)).shape
        (4, 10)

    """

    def __init__(self, alpha: float, seed: int = 0) -> None:
        if not 0 < alpha < float("inf"):
            raise ValueError(f"alpha must be finite and above 0, got {alpha}")
        self.alpha = alpha
        self.seed = seed

    def split(self, labels: np.ndarray, num_workers: int, generator: np.random.Generator) -> np.ndarray:
        """Return the same partition in every epoch."""
        own = np.random.default_rng(self.seed)
        classes = np.unique(labels)
        shares = own.dirichlet(np.full(len(classes), self.alpha), size=num_workers)
        piles = [list(own.permutation(np.flatnonzero(labels == label))) for label in classes]
        missing = np.full(num_workers, len(labels) // num_workers)
        hands: list[list[int]] = [[] for _ in range(num_workers)]
        # Every round ends with all workers served, or one more class used up.
        while missing.any():
            left = np.array([len(pile) for pile in piles])
            for worker in own.permutation(np.flatnonzero(missing)):
                wanted = own.multinomial(missing[worker], _shares_of_what_is_left(shares[worker], left))
                for pile, number in zip(piles, wanted, strict=True):
                    taken = min(number, len(pile))
                    hands[worker].extend(pile[len(pile) - taken :])
                    del pile[len(pile) - taken :]
                    missing[worker] -= taken
        return np.array(hands)


class WorkerSampler(DistributedSampler[list[int]]):
    """Yields batches of indices: batch j of a process that acts as k workers is for its worker j modulo k.

    All workers get the same number of batches, reshuffled in every epoch; the remainder is dropped. For a
    ``DataLoader(dataset, batch_size=None, sampler=...)``. Lightning keeps a DistributedSampler, and calls its
    ``set_epoch``.

    Args:
        labels: [n], the images' classes.
        partition: assigns the images to the workers.
        batch_size: of one worker.
        num_workers: of all processes together.
        num_processes: number of processes.
        rank: of this process.
        seed: the same on all processes.

    Raises:
        ValueError: if there are too few images for one batch per worker.

    """

    def __init__(
        self,
        labels: np.ndarray,
        partition: Partition,
        batch_size: int,
        num_workers: int,
        num_processes: int = 1,
        rank: int = 0,
        seed: int = 0,
    ) -> None:
        super().__init__(labels, num_replicas=num_processes, rank=rank, seed=seed)  # type: ignore[arg-type]
        self.labels = labels
        self.partition = partition
        self.batch_size = batch_size
        self.num_workers = num_workers
        self.workers_per_process = num_workers // num_processes
        self.batches_per_worker = len(labels) // num_workers // batch_size
        if self.batches_per_worker == 0:
            raise ValueError(
                f"batch_size must satisfy batch_size <= n / m, got batch_size={batch_size} with n={len(labels)} images"
                f" for m={num_workers} workers"
            )

    def __len__(self) -> int:
        return self.batches_per_worker * self.workers_per_process

    def __iter__(self) -> Iterator[list[int]]:
        # The same draws on all processes, so that their parts are disjoint.
        generator = np.random.default_rng([self.seed, self.epoch])
        parts = self.partition.split(self.labels, self.num_workers, generator)
        parts = generator.permuted(parts, axis=1)[:, : self.batches_per_worker * self.batch_size]
        first = self.rank * self.workers_per_process
        mine = parts[first : first + self.workers_per_process]
        batches = mine.reshape(self.workers_per_process, self.batches_per_worker, self.batch_size).swapaxes(0, 1)
        yield from batches.reshape(-1, self.batch_size).tolist()


def worker_sampler(trainer: pl.Trainer, labels: Tensor, partition: Partition, batch_size: int) -> WorkerSampler:
    """Return the sampler for the processes and workers of a Trainer, seeded as Lightning seeds its own."""
    strategy = trainer.strategy
    is_robust = isinstance(strategy, ByzantineDDPStrategy)
    return WorkerSampler(
        labels.numpy(),
        partition,
        batch_size,
        num_workers=strategy.num_workers if is_robust else trainer.world_size,
        num_processes=trainer.world_size,
        rank=trainer.global_rank,
        seed=int(os.environ.get("PL_GLOBAL_SEED", "0")),
    )


def _rows(indices: np.ndarray, num_workers: int) -> np.ndarray:
    size = len(indices) // num_workers
    return indices[: num_workers * size].reshape(num_workers, size)


def _shares_of_what_is_left(shares: np.ndarray, left: np.ndarray) -> np.ndarray:
    available = np.where(left > 0, shares, 0.0)
    if available.sum() == 0:  # only classes in which the worker's proportion is 0
        available = left.astype(float)
    return available / available.sum()
