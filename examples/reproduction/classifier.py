"""The LightningModule that a cell of the grid trains."""

import lightning.pytorch as pl
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy


class Classifier(pl.LightningModule):
    """A classifier under SGD, which only records the validation accuracy, to keep steps short.

    Args:
        network: from images to logits.
        lr: learning rate.
        momentum: momentum of SGD.
        weight_decay: of SGD.

    Attributes:
        accuracies: after every epoch, on the validation images.

    """

    def __init__(self, network: nn.Module, lr: float, momentum: float = 0.0, weight_decay: float = 0.0) -> None:
        super().__init__()
        self.network = network.to(memory_format=torch.channels_last)  # convolutions are a quarter faster
        self.lr = lr
        self.momentum = momentum
        self.weight_decay = weight_decay
        self.accuracies: list[float] = []
        self._correct: list[Tensor] = []

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        images, labels = batch
        return cross_entropy(self.network(images), labels)

    def validation_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        images, labels = batch
        self._correct.append(self.network(images).argmax(dim=1) == labels)

    def on_validation_epoch_end(self) -> None:
        self.accuracies.append(torch.cat(self._correct).double().mean().item())
        self._correct.clear()

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=self.lr, momentum=self.momentum, weight_decay=self.weight_decay)
