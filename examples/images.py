"""The base class of the examples' data modules."""

from abc import abstractmethod
from pathlib import Path

import lightning.pytorch as pl
import numpy as np
import torch
from partitions import Partition, worker_sampler
from torch.utils.data import DataLoader, TensorDataset, random_split

_KEYS = ("x_train", "y_train", "x_test", "y_test")

Arrays = tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]


class ImageData(pl.LightningDataModule):
    """Images with labels, standardized by the training images; see the subclasses.

    Args:
        path: where the images are.
        batch_size: images in one batch of one worker.
        partition: how to divide the training images among workers, such as ``IID()``, ``Dirichlet(alpha=0.1)`` or
            ``LabelSorted()``. None for Lightning's shuffling and distribution over processes.
        validation: the fraction of the training images for validation. With 0, all are for training, and validation
            uses the test images: for curves, not for model selection.

    """

    def __init__(
        self,
        path: str | None = None,
        batch_size: int = 32,
        partition: Partition | None = None,
        validation: float = 0.1,
    ) -> None:
        super().__init__()
        if not 0 <= validation < 1:
            raise ValueError(f"validation must satisfy 0 <= validation < 1, got {validation}")
        self.path = path
        self.batch_size = batch_size
        self.partition = partition
        self.validation = validation

    @abstractmethod
    def load(self) -> Arrays:
        """Return training images and their labels, test images and their labels.

        Images are [n, height, width] or [n, height, width, channels].
        """

    def setup(self, stage: str) -> None:
        train_images, train_labels, test_images, test_labels = self.load()
        # Each channel by the training images only: test images must not influence training.
        mean, deviation = train_images.mean(axis=(0, 1, 2)), train_images.std(axis=(0, 1, 2))

        def dataset(images: np.ndarray, labels: np.ndarray) -> TensorDataset:
            pixels = torch.from_numpy(((images - mean) / deviation).astype(np.float32))
            pixels = pixels[:, None] if pixels.ndim == 3 else pixels.permute(0, 3, 1, 2).contiguous()
            return TensorDataset(pixels, torch.from_numpy(labels).long())

        self.train_set, self.test_set = dataset(train_images, train_labels), dataset(test_images, test_labels)
        self.val_set = self.test_set
        if self.validation > 0:
            # The same on every rank.
            self.train_set, self.val_set = random_split(
                self.train_set, [1 - self.validation, self.validation], generator=torch.Generator().manual_seed(0)
            )

    def train_dataloader(self) -> DataLoader:
        if self.partition is None:
            return DataLoader(self.train_set, self.batch_size, shuffle=True, drop_last=True)
        images, labels = self.train_set[:]
        sampler = worker_sampler(self.trainer, labels, self.partition, self.batch_size)
        return DataLoader(TensorDataset(images, labels), batch_size=None, sampler=sampler)

    def val_dataloader(self) -> DataLoader:
        return DataLoader(self.val_set, batch_size=256)

    def test_dataloader(self) -> DataLoader:
        return DataLoader(self.test_set, batch_size=256)


def load_archive(path: str | Path) -> Arrays:
    """Return the arrays of an ``.npz`` in the layout of Keras: ``x_train, y_train, x_test, y_test``."""
    with np.load(path) as archive:
        if missing := set(_KEYS) - set(archive.files):
            raise ValueError(f"path must be an archive of {', '.join(_KEYS)}, got {path} without {missing}")
        train_images, train_labels, test_images, test_labels = (archive[key] for key in _KEYS)
    return train_images, train_labels.reshape(-1), test_images, test_labels.reshape(-1)
