"""A small convolutional network and real images of digits, shared by the examples."""

from pathlib import Path

import lightning.pytorch as pl
import torch
from images import Arrays, ImageData, load_archive
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch import Tensor, nn
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


class DigitData(ImageData):
    """Real images of handwritten digits.

    Args:
        path: an ``mnist.npz`` in the layout of Keras (``x_train, y_train, x_test, y_test``). None for the 1,797 images
            of 8 x 8 pixels that come with scikit-learn, a quarter of which are for testing.
        batch_size: images in one batch of one worker.
        partition: how to divide the training images among workers; see :class:`~images.ImageData`.
        validation: the fraction of the training images for validation; see :class:`~images.ImageData`.

    """

    def prepare_data(self) -> None:
        if self.path is not None and not Path(self.path).is_file():
            raise FileNotFoundError(f"path must be an archive such as mnist.npz, got {self.path}, which is not a file")

    def load(self) -> Arrays:
        if self.path is not None:
            return load_archive(self.path)
        digits = load_digits()
        train_x, test_x, train_y, test_y = train_test_split(
            digits.images, digits.target, test_size=0.25, random_state=0, stratify=digits.target
        )
        return train_x, train_y, test_x, test_y
