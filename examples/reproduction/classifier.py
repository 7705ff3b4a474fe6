"""The LightningModule that a cell of the grid trains."""

from typing import Any

import lightning.pytorch as pl
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from lightning_byzantine.estimators.ball import Ball


class Classifier(pl.LightningModule):
    """A classifier under SGD, which only records the validation accuracy, to keep steps short.

    Args:
        network: from images to logits.
        lr: learning rate.
        momentum: momentum of SGD.
        weight_decay: of SGD.
        dampening: of SGD.
        radius: of the ball around 0 that each parameter tensor is projected onto after every step; None for no
            projection.

    Attributes:
        accuracies: after every epoch, on the validation images.

    """

    def __init__(
        self,
        network: nn.Module,
        lr: float,
        momentum: float = 0.0,
        weight_decay: float = 0.0,
        dampening: float = 0.0,
        radius: float | None = None,
    ) -> None:
        super().__init__()
        self.network = network.to(memory_format=torch.channels_last)  # convolutions are a quarter faster
        self.lr = lr
        self.momentum = momentum
        self.weight_decay = weight_decay
        self.dampening = dampening
        self.ball = None if radius is None else Ball(radius)
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
        optimizer = torch.optim.SGD(
            self.parameters(), self.lr, self.momentum, self.dampening, weight_decay=self.weight_decay
        )
        if self.ball is not None:
            optimizer.register_step_post_hook(self._project)
        return optimizer

    def _project(self, *_: Any) -> None:
        assert self.ball is not None
        points = [parameter.data for parameter in self.parameters()]
        self.ball.project(points, points)
