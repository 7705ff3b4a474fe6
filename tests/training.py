"""Small models and a Trainer for the processes of a RankPool."""

from typing import Any

import lightning.pytorch as pl
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_byzantine import ByzantineDDPStrategy


class Regression(pl.LightningModule):
    """A small network; what it is trained on differs from rank to rank."""

    def __init__(self, optimizer: str = "SGD") -> None:
        super().__init__()
        self.optimizer = optimizer
        self.network = nn.Sequential(nn.Linear(8, 16), nn.Tanh(), nn.Linear(16, 16), nn.Tanh(), nn.Linear(16, 1))

    def forward(self, inputs: Tensor) -> Tensor:
        return self.network(inputs)

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        inputs, targets = batch
        loss = nn.functional.mse_loss(self(inputs), targets)
        self.log("loss", loss, sync_dist=True)
        return loss

    def validation_step(self, batch: list[Tensor], batch_idx: int) -> None:
        self.log("val_loss", nn.functional.mse_loss(self(batch[0]), batch[1]), sync_dist=True)

    test_step = validation_step

    def predict_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        return self(batch[0])

    def configure_optimizers(self) -> torch.optim.Optimizer:
        if self.optimizer == "Adam":
            # Otherwise, where a gradient is 0 but for rounding, its sign would decide a whole step.
            return torch.optim.Adam(self.parameters(), lr=1e-2, eps=1e-3)
        return torch.optim.SGD(self.parameters(), lr=0.1, momentum=0.9)


def loader(num_batches: int = 10) -> DataLoader:
    """Return batches of 4; Lightning's DistributedSampler gives every rank its own."""
    world_size = torch.distributed.get_world_size()
    generator = torch.Generator().manual_seed(7)
    inputs = torch.randn(4 * num_batches * world_size, 8, generator=generator)
    targets = torch.sin(inputs.sum(1, keepdim=True)) + 0.1 * torch.randn(len(inputs), 1, generator=generator)
    return DataLoader(TensorDataset(inputs, targets), batch_size=4)


class ParametersOfEveryStep(pl.Callback):
    """Keeps all parameters after every batch."""

    def __init__(self) -> None:
        self.history: list[Tensor] = []

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *_: Any) -> None:
        self.history.append(parameters(pl_module))


def parameters(module: nn.Module) -> Tensor:
    """Return all parameters as one float64 vector."""
    return torch.cat([parameter.detach().double().flatten() for parameter in module.parameters()])


def trainer(strategy: Any, **kwargs: Any) -> pl.Trainer:
    """Return a quiet Trainer over all ranks of the pool."""
    defaults: dict[str, Any] = {
        "accelerator": "cpu",
        "devices": torch.distributed.get_world_size(),
        "strategy": strategy,
        "max_epochs": 1,
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
    }
    return pl.Trainer(**(defaults | kwargs))


def fit(strategy: Any, model: pl.LightningModule | None = None, num_batches: int = 10, **kwargs: Any) -> Tensor:
    """Train for ``num_batches`` batches; return the parameters after each, [num_batches, num_parameters]."""
    torch.manual_seed(1)
    history = ParametersOfEveryStep()
    callbacks = [history, *kwargs.pop("callbacks", [])]
    ckpt_path = kwargs.pop("ckpt_path", None)
    trainer(strategy, callbacks=callbacks, **kwargs).fit(
        model or Regression(), loader(num_batches), ckpt_path=ckpt_path
    )
    return torch.stack(history.history)


__all__ = ["ByzantineDDPStrategy", "ParametersOfEveryStep", "Regression", "fit", "loader", "parameters", "trainer"]
