"""After training, Lightning evaluates the divided model and saves it."""

from pathlib import Path

import pytest
import torch
from rank_pool import RankPool
from sharded_models import BATCH, Sharded, data, whole
from torch.utils.data import DataLoader
from training import trainer

from lightning_byzantine import ByzantineModelParallelStrategy


def fit_and_evaluate(path: Path) -> tuple[float, int, float]:
    torch.manual_seed(1)
    model = Sharded()
    strategy = ByzantineModelParallelStrategy(2, 2, save_distributed_checkpoint=False)
    fitted = trainer(strategy)
    fitted.fit(model, DataLoader(data(3), batch_size=BATCH))
    before = whole(model)
    validated = fitted.validate(model, DataLoader(data(3), batch_size=BATCH), verbose=False)[0]["val_loss"]
    fitted.save_checkpoint(path)
    assert torch.equal(whole(model), before)
    return validated, fitted.num_val_batches[0], float(before.sum())


def test_evaluates_and_saves_after_training(four_ranks: RankPool, tmp_path: Path) -> None:
    path = tmp_path / "whole.ckpt"
    first, *others = four_ranks.run(fit_and_evaluate, path)
    assert others == [first] * 3
    validated, num_batches, total = first
    assert num_batches == 3  # of each rank: the four ranks share the data
    assert sum(value.double().sum().item() for value in torch.load(path)["state_dict"].values()) == pytest.approx(total)
    model = Sharded()
    model.load_state_dict(torch.load(path)["state_dict"])
    inputs, targets = data(3, num_shares=4).tensors
    loss = torch.nn.functional.mse_loss(model(inputs, 0), targets)
    assert validated == pytest.approx(loss.item(), rel=1e-5)
