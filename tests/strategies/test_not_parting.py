"""Ranks that look as if they went different ways, or are slow, in programs that are right."""

import time
from collections.abc import Callable
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from rank_pool import RankPool
from torch import Tensor, nn
from torch.utils.data import DataLoader
from training import Regression, loader, trainer

from lightning_byzantine import ByzantineDDPStrategy


class UnevenBackwards(Regression):
    """Ranks call backward differently often before they synchronize, and rank 0 is slow once."""

    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False

    def training_step(self, batch: list[Tensor], batch_idx: int) -> None:
        optimizer = self.optimizers()
        for _ in range(1 + (self.global_rank == 0)):
            with optimizer.toggle_model(sync_grad=False):
                self.manual_backward(self.loss(batch))
        with optimizer.toggle_model(sync_grad=True):
            self.manual_backward(self.loss(batch))
        if batch_idx == 2 and self.global_rank == 0:
            time.sleep(2.5)
        optimizer.step()
        optimizer.zero_grad()

    def loss(self, batch: list[Tensor]) -> Tensor:
        return nn.functional.mse_loss(self(batch[0]), batch[1])


class MetricOfSomeRanks(Regression):
    """Two of three ranks log the mean of theirs."""

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        loss = nn.functional.mse_loss(self(batch[0]), batch[1])
        if self.global_rank < 2:
            self.log("loss", loss, sync_dist=True, sync_dist_group=self.group)
        return loss

    def on_fit_start(self) -> None:
        self.group = torch.distributed.new_group([0, 1])


class MoreToValidateOnOneRank(Regression):
    def val_dataloader(self) -> DataLoader:
        return DataLoader(torch.randn(2 + 3 * self.global_rank, 8), batch_size=1)

    def validation_step(self, batch: Tensor, batch_idx: int) -> None:
        self.log("val_loss", self(batch).mean(), sync_dist=True)


class BackwardToInputs(Regression):
    """Moves inputs against the network, whose parameters then have no gradient; on rank 1 twice in a batch."""

    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False

    def training_step(self, batch: list[Tensor], batch_idx: int) -> None:
        inputs, targets = batch
        optimizer = self.optimizers()
        for _ in range(1 + (self.global_rank == 1)):
            moved = inputs.clone().requires_grad_()
            self.requires_grad_(False)
            self.manual_backward(-nn.functional.mse_loss(self(moved), targets))
            self.requires_grad_(True)
            inputs = inputs - 0.01 * moved.grad.sign()
        if batch_idx == 2 and self.global_rank == 0:
            time.sleep(2.5)
        optimizer.zero_grad()
        self.manual_backward(nn.functional.mse_loss(self(inputs), targets))
        optimizer.step()


class SlowRank(Regression):
    """Rank 0 has more to do than the others in hooks of all kinds."""

    def linger(self, *_: Any) -> None:
        if self.global_rank == 0 and self.trainer.current_epoch == 0:
            time.sleep(1.5)

    on_train_start = on_train_end = on_save_checkpoint = on_train_epoch_end = on_fit_end = linger


def train(model: Callable[[], pl.LightningModule]) -> float:
    torch.manual_seed(1)
    module = model()
    trainer(ByzantineDDPStrategy()).fit(module, loader())
    return float(sum(parameter.sum() for parameter in module.parameters()))


@pytest.mark.parametrize(
    "model",
    [UnevenBackwards, MetricOfSomeRanks, MoreToValidateOnOneRank, BackwardToInputs, SlowRank],
    ids=lambda model: model.__name__,
)
def test_trains_to_the_end(three_ranks: RankPool, model: type[pl.LightningModule]) -> None:
    assert len(set(three_ranks.run(train, model))) == 1
