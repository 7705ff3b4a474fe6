"""Callbacks that unfreeze parameters in the middle of a run."""

from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.callbacks import BackboneFinetuning
from lightning.pytorch.strategies import DDPStrategy
from rank_pool import RankPool
from torch import Tensor, nn
from training import Regression, fit

from lightning_byzantine import ByzantineDDPStrategy
from lightning_byzantine.aggregators import Mean


class WithBackbone(Regression):
    def __init__(self) -> None:
        super().__init__()
        self.backbone = nn.Linear(8, 8)

    def forward(self, inputs: Tensor) -> Tensor:
        return super().forward(self.backbone(inputs))

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.network.parameters(), lr=0.1)


class FreezesLate(BackboneFinetuning):
    """What the error and the strategy's README advise."""

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        pass

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self.freeze_before_training(pl_module)
        super().on_fit_start(trainer, pl_module)


def finetune(strategy: Any, callback: type[BackboneFinetuning]) -> Tensor:
    torch.manual_seed(3)
    callbacks = [callback(unfreeze_backbone_at_epoch=1)]
    return fit(strategy, WithBackbone(), num_batches=3, max_epochs=3, callbacks=callbacks)


def refusal() -> str:
    with pytest.raises(MisconfigurationException) as caught:
        finetune(ByzantineDDPStrategy(find_unused_parameters=True), BackboneFinetuning)
    return str(caught.value)


def test_what_is_frozen_in_setup_can_not_be_unfrozen(two_ranks: RankPool) -> None:
    for error in two_ranks.run(refusal):
        assert "The parameter 'backbone.weight' was frozen when DDP was set up" in error
        assert "override `setup` to do nothing, and `on_fit_start` to call" in error


@pytest.mark.parametrize("estimator", ["auto", None])
def test_the_advice_works(two_ranks: RankPool, estimator: str | None) -> None:
    strategy = ByzantineDDPStrategy(aggregator=Mean(), estimator=estimator, find_unused_parameters=True)
    stock = two_ranks.run(finetune, DDPStrategy(find_unused_parameters=True), FreezesLate)[0]
    first, second = two_ranks.run(finetune, strategy, FreezesLate)
    backbone = slice(-72, None)
    assert torch.equal(first[2, backbone], first[0, backbone])
    assert not torch.equal(first[3, backbone], first[2, backbone])
    assert torch.equal(first, second)
    torch.testing.assert_close(first, stock, rtol=0, atol=1e-5)
