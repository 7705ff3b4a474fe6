"""A small convolutional network and real images of digits, shared by the examples."""

import lightning.pytorch as pl
import numpy as np
import torch
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset, random_split
from torchmetrics.classification import MulticlassAccuracy


class DigitClassifier(pl.LightningModule):
    """Two convolutions with batch normalisation, then a linear layer; SGD with momentum.

    Args:
        lr: learning rate.
        momentum: momentum of SGD.

    """

    def __init__(self, lr: float = 0.05, momentum: float = 0.9) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.network = nn.Sequential(
            nn.Conv2d(1, 16, kernel_size=3, padding=1),
            nn.BatchNorm2d(16),
            nn.ReLU(),
            nn.MaxPool2d(2),
            nn.Conv2d(16, 32, kernel_size=3, padding=1),
            nn.BatchNorm2d(32),
            nn.ReLU(),
            nn.AdaptiveMaxPool2d(4),
            nn.Flatten(),
            nn.Linear(32 * 4 * 4, 10),
        )
        self.loss = nn.CrossEntropyLoss()
        self.val_accuracy = MulticlassAccuracy(num_classes=10, average="micro")
        self.test_accuracy = MulticlassAccuracy(num_classes=10, average="micro")

    def forward(self, images: Tensor) -> Tensor:
        return self.network(images)

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        images, labels = batch
        loss = self.loss(self(images), labels)
        self.log("train_loss", loss)
        return loss

    def validation_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        images, labels = batch
        self.val_accuracy(self(images), labels)
        self.log("val_accuracy", self.val_accuracy, prog_bar=True)

    def test_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        images, labels = batch
        self.test_accuracy(self(images), labels)
        self.log("test_accuracy", self.test_accuracy)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=self.hparams.lr, momentum=self.hparams.momentum)


class DigitData(pl.LightningDataModule):
    """Real images of handwritten digits.

    Args:
        path: an ``mnist.npz`` as Keras lays it out (``x_train, y_train, x_test, y_test``). None for the 1,797 images of
            8 x 8 pixels that come with scikit-learn, a quarter of which are for testing.
        batch_size: images in one batch of one worker.

    """

    def __init__(self, path: str | None = None, batch_size: int = 32) -> None:
        super().__init__()
        self.path = path
        self.batch_size = batch_size

    def setup(self, stage: str) -> None:
        train_images, train_labels, test_images, test_labels = self._load()
        # By the training images alone, so that the test stays a test.
        mean, deviation = train_images.mean(), train_images.std()

        def dataset(images: np.ndarray, labels: np.ndarray) -> TensorDataset:
            pixels = torch.from_numpy((images - mean) / deviation).float()
            return TensorDataset(pixels[:, None], torch.from_numpy(labels).long())

        # A tenth of the training images is for validation, the same on every rank.
        self.train_set, self.val_set = random_split(
            dataset(train_images, train_labels), [0.9, 0.1], generator=torch.Generator().manual_seed(0)
        )
        self.test_set = dataset(test_images, test_labels)

    def train_dataloader(self) -> DataLoader:
        return DataLoader(self.train_set, self.batch_size, shuffle=True, drop_last=True)

    def val_dataloader(self) -> DataLoader:
        return DataLoader(self.val_set, batch_size=256)

    def test_dataloader(self) -> DataLoader:
        return DataLoader(self.test_set, batch_size=256)

    def _load(self) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
        if self.path is None:
            digits = load_digits()
            train_x, test_x, train_y, test_y = train_test_split(
                digits.images, digits.target, test_size=0.25, random_state=0, stratify=digits.target
            )
            return train_x, train_y, test_x, test_y
        keys = ("x_train", "y_train", "x_test", "y_test")
        with np.load(self.path) as archive:
            if missing := set(keys) - set(archive.files):
                raise ValueError(f"path must be an archive of {', '.join(keys)}, got {self.path} without {missing}")
            return tuple(archive[key] for key in keys)
