"""Bad replicas are outvoted as a whole, and named with their ranks."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from rank_pool import RankPool
from sharded_models import OneUnit, Sharded, fit_replicas, train
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.utils.data import TensorDataset

from lightning_byzantine import ByzantineModelParallelStrategy
from lightning_byzantine.attacks import Attack, GaussianNoise, NonFinite, OneLayer, SignFlip
from lightning_byzantine.callbacks import ByzantineMonitor, ByzantineSimulation
from lightning_byzantine.monitoring import Suspect

SHAPE = (3, 2)


def fit_and_name(attack: Attack, **arguments: Any) -> tuple[Tensor, list[int], list[str]]:
    suspects: list[Suspect] = []
    monitor = ByzantineMonitor(on_suspect=suspects.append, audit=None)
    callbacks = [ByzantineSimulation(attack, workers=[1]), monitor]
    history = fit_replicas(SHAPE, callbacks=callbacks, **arguments)
    return history, monitor.suspects, [str(suspect) for suspect in suspects]


@pytest.mark.parametrize(
    ("attack", "exchange"),
    [(GaussianNoise(std=10.0), "all_gather"), (NonFinite(), "all_to_all")],
    ids=["noise", "not finite"],
)
def test_a_bad_replica_is_named_with_its_ranks(
    six_ranks: RankPool, attack: Attack, exchange: str, tmp_path: Path
) -> None:
    first, *others = six_ranks.run(fit_and_name, attack, exchange=exchange, default_root_dir=tmp_path)
    history, suspects, named = first
    assert history.isfinite().all()
    assert suspects == [1]
    assert named[0].startswith("worker 1 (ranks 2-3, host ")
    for other, *same in others:
        assert torch.equal(history, other)
        assert same == [suspects, named]


class OneBadRank(Sharded):
    """On rank 2, all losses are NaN, and with them the gradient of its replica."""

    def loss(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        return super().loss(batch, batch_idx) * (torch.nan if self.global_rank == 2 else 1)


def fit_with_one_bad_rank(**arguments: Any) -> Tensor:
    return train(ByzantineModelParallelStrategy(*SHAPE, **arguments), OneBadRank(), num_steps=3)


@pytest.mark.parametrize("exchange", ["all_gather", "all_to_all"])
def test_one_bad_rank_spoils_its_replica_only(six_ranks: RankPool, exchange: str) -> None:
    first, *others = six_ranks.run(fit_with_one_bad_rank, exchange=exchange)
    assert first.isfinite().all()
    assert not torch.equal(first[0], first[-1])
    assert all(torch.equal(first, other) for other in others)


def test_steps_with_too_many_bad_replicas_are_skipped(six_ranks: RankPool) -> None:
    history = six_ranks.run(fit_with_one_bad_rank, num_byzantine=0, on_breakdown="skip")[0]
    assert torch.equal(history[0], history[-1])


class Digits(OneUnit):
    def __init__(self) -> None:
        super().__init__()
        self.network = nn.Sequential(nn.Linear(64, 33), nn.ReLU(), nn.Linear(33, 10))

    def loss(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        return nn.functional.cross_entropy(self(batch[0], batch_idx), batch[1])

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.3, momentum=0.9)


def accuracy_on_digits(attack: Attack | None, folder: Path) -> tuple[float, list[int]]:
    """Return the accuracy on other images after training with 5 replicas of 2 ranks, and who was named."""
    torch.manual_seed(1)
    images, labels = load_digits(return_X_y=True)
    inputs, targets = torch.tensor(images / 16, dtype=torch.float32), torch.tensor(labels)
    suspects: list[Suspect] = []
    monitor = ByzantineMonitor(on_suspect=suspects.append, audit=None)
    callbacks = [monitor] if attack is None else [monitor, ByzantineSimulation(attack, workers=[1, 4])]
    strategy = ByzantineModelParallelStrategy(5, 2, exchange="all_to_all")
    model = Digits()
    dataset = TensorDataset(inputs[:1280], targets[:1280])
    train(strategy, model, dataset, batch_size=64, max_epochs=20, callbacks=callbacks, default_root_dir=folder)
    right = model(inputs[1280:], 0).argmax(dim=1) == targets[1280:]
    return float(right.float().mean()), sorted({suspect.worker for suspect in suspects})


@pytest.fixture(scope="module")
def ten_ranks() -> Iterator[RankPool]:
    pool = RankPool(10)
    yield pool
    pool.close()


@pytest.mark.slow
def test_two_of_five_replicas_do_no_harm(ten_ranks: RankPool, tmp_path: Path) -> None:
    clean, suspects = ten_ranks.run(accuracy_on_digits, None, tmp_path)[0]
    assert suspects == []
    for attack in (GaussianNoise(std=10.0), NonFinite(), SignFlip(), OneLayer()):
        accuracy, suspects = ten_ranks.run(accuracy_on_digits, attack, tmp_path)[0]
        assert accuracy > clean - 0.03
        assert suspects == [1, 4]
