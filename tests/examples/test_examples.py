"""The main job: real images, five workers of which two are Byzantine, the strategies and attacks of the README."""

from functools import cache
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import numpy as np
import pytest
from compare import ATTACKS
from digits import DigitClassifier, DigitData
from rank_pool import RankPool
from training import trainer

from lightning_byzantine import attacks
from lightning_byzantine.callbacks import ByzantineSimulation

SEED, EPOCHS = 3, 12


def under(*names: str) -> pytest.MarkDecorator:
    """Run under each of the attacks; by default only under that which looks least like a fault."""
    slow = [pytest.param(name, marks=pytest.mark.slow) for name in names if name != "LabelFlip"]
    return pytest.mark.parametrize("attack", ["LabelFlip", *slow])


def accuracy_on_digits(strategy: str, attack: str | None = None) -> float:
    pl.seed_everything(SEED)
    callbacks = [ByzantineSimulation(getattr(attacks, attack)(**ATTACKS[attack]), [0, 3])] if attack else []
    runner = trainer(strategy, callbacks=callbacks, max_epochs=EPOCHS)
    model, data = DigitClassifier(), DigitData()
    runner.fit(model, data)
    return runner.test(model, data, verbose=False)[0]["test_accuracy"]


@cache
def clean_accuracy(ranks: RankPool) -> float:
    return ranks.run(accuracy_on_digits, "ddp")[0]


def test_trains_without_an_attack(five_ranks: RankPool) -> None:
    clean = clean_accuracy(five_ranks)
    assert clean > 0.95
    assert five_ranks.run(accuracy_on_digits, "byzantine_ddp")[0] > clean - 0.04


@under(*ATTACKS)
def test_byzantine_ddp_survives(five_ranks: RankPool, attack: str) -> None:
    assert five_ranks.run(accuracy_on_digits, "byzantine_ddp", attack)[0] > clean_accuracy(five_ranks) - 0.04


@under("LabelFlip", "GaussianNoise", "NonFinite")
def test_stock_ddp_does_not(five_ranks: RankPool, attack: str) -> None:
    assert five_ranks.run(accuracy_on_digits, "ddp", attack)[0] < clean_accuracy(five_ranks) - 0.2


def archive(folder: Path, **arrays: Any) -> Path:
    np.savez(folder / "mnist.npz", **arrays)
    return folder / "mnist.npz"


def test_reads_an_archive_in_the_layout_of_keras(tmp_path: Path) -> None:
    images, labels = np.arange(20 * 28 * 28).reshape(20, 28, 28) % 256, np.arange(20) % 10
    path = archive(tmp_path, x_train=images, y_train=labels, x_test=images[:5], y_test=labels[:5])
    data = DigitData(str(path), batch_size=4)
    data.setup("fit")
    assert (len(data.train_set), len(data.val_set), len(data.test_set)) == (18, 2, 5)
    images, labels = next(iter(data.test_dataloader()))
    assert images.shape == (5, 1, 28, 28)
    assert labels.tolist() == [0, 1, 2, 3, 4]
    assert DigitClassifier()(images).shape == (5, 10)


def test_says_what_an_archive_lacks(tmp_path: Path) -> None:
    path = archive(tmp_path, x_train=np.zeros(1), y_train=np.zeros(1), x_test=np.zeros(1))
    with pytest.raises(ValueError, match=r"archive of x_train, y_train, x_test, y_test, got .* without \{'y_test'\}"):
        DigitData(str(path)).setup("fit")
