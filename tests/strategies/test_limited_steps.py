"""How far a step of worker momentum goes when a rule changes its mind, in training at the defaults."""

from collections.abc import Collection
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from rank_pool import RankPool
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset
from training import fit as fit_regression
from training import trainer

from lightning_byzantine import ByzantineDDPStrategy
from lightning_byzantine.aggregators import Aggregator, GeometricMedian, Mean, PersistentFilter
from lightning_byzantine.attacks import Alternating
from lightning_byzantine.callbacks import ByzantineSimulation
from lightning_byzantine.estimators import WorkerMomentum

STEPS = 40


class Classifier(pl.LightningModule):
    """Keeps the length of what the optimizer receives."""

    def __init__(self, optimizer: str) -> None:
        super().__init__()
        self.optimizer = optimizer
        self.network = nn.Sequential(nn.Linear(20, 40), nn.Tanh(), nn.Linear(40, 10))
        self.lengths: list[float] = []

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        return nn.functional.cross_entropy(self.network(batch[0]), batch[1])

    def on_before_optimizer_step(self, optimizer: torch.optim.Optimizer) -> None:
        gradients = [parameter.grad.flatten() for parameter in self.parameters()]
        self.lengths.append(float(torch.cat(gradients).norm()))

    def configure_optimizers(self) -> torch.optim.Optimizer:
        kind, lr = (torch.optim.Adam, 3e-3) if self.optimizer == "Adam" else (torch.optim.SGD, 0.1)
        return kind(self.parameters(), lr=lr)


class Watched(WorkerMomentum):
    """Counts the steps that were not taken as a whole: after these, the state is not what was aggregated."""

    def __init__(self) -> None:
        super().__init__()
        self.num_limited = 0
        self.aggregates: dict[str, Tensor] = {}

    def limit(self, names: Collection[str], scale: Any) -> None:
        self.num_limited += self.was_limited()
        super().limit(names, scale)

    def gradient(self, name: str, aggregate: Tensor, out: Tensor) -> None:
        self.aggregates[name] = aggregate.clone()
        super().gradient(name, aggregate, out)

    def was_limited(self) -> bool:
        state = self.shared_state()
        return not all(torch.equal(state[name], aggregate) for name, aggregate in self.aggregates.items())


class Unlimited(WorkerMomentum):
    def limit(self, names: Collection[str], scale: Any) -> None:
        pass


def fit(
    num_workers: int,
    estimator: WorkerMomentum,
    optimizer: str = "SGD",
    factor: float | None = None,
) -> Tensor:
    """Return the lengths of the gradients in all steps, under an attack by the largest minority or without."""
    num_byzantine = (num_workers - 1) // 2
    strategy = ByzantineDDPStrategy(estimator=estimator, workers_per_process=num_workers)
    attacks = [] if factor is None else [ByzantineSimulation(Alternating(factor), range(num_byzantine))]
    generator = torch.Generator().manual_seed(7)
    inputs = torch.randn(8 * num_workers * STEPS, 20, generator=generator)
    targets = (inputs @ torch.randn(20, 10, generator=generator)).argmax(dim=1)
    torch.manual_seed(3)
    model = Classifier(optimizer)
    runner = trainer(strategy, callbacks=attacks)
    runner.fit(model, DataLoader(TensorDataset(inputs, targets), batch_size=8))
    return torch.tensor(model.lengths)


def fit_watched(**arguments: Any) -> int:
    estimator = Watched()
    fit(estimator=estimator, **arguments)
    return estimator.num_limited


@pytest.mark.parametrize("optimizer", ["SGD", pytest.param("Adam", marks=pytest.mark.slow)])
def test_steps_are_as_long_as_ever_where_nobody_attacks(one_rank: RankPool, optimizer: str) -> None:
    assert one_rank.run(fit_watched, num_workers=16, optimizer=optimizer) == [0]


@pytest.mark.parametrize(("num_workers", "optimizer"), [(5, "Adam"), (9, "SGD")])
def test_who_changes_sides_in_every_step_does_not_move_the_optimizer_far(
    one_rank: RankPool, num_workers: int, optimizer: str
) -> None:
    clean, attacked, unlimited = (
        one_rank.run(fit, num_workers, estimator, optimizer, factor)[0][10:]
        for estimator, factor in ((WorkerMomentum(), None), (WorkerMomentum(), 0.5), (Unlimited(), 0.5))
    )
    assert attacked.mean() < 2 * clean.mean()
    # In a single step, workers who go back from where the liars were are taken for a change of the gradient.
    assert attacked.max() < 2.7 * clean.max()
    assert unlimited.max() > 3 * clean.max()


def farthest(**arguments: Any) -> float:
    """Return how long the parameters become at a learning rate at which the gradient goes to and fro."""
    return float(fit_regression(ByzantineDDPStrategy(**arguments), num_batches=150).norm(dim=1).max())


@pytest.mark.parametrize(
    "aggregator",
    [PersistentFilter(), pytest.param(GeometricMedian(), marks=pytest.mark.slow)],
    ids=["default", "median"],
)
def test_training_stays_stable_where_it_is_with_the_mean(five_ranks: RankPool, aggregator: Aggregator) -> None:
    of_mean = five_ranks.run(farthest, aggregator=Mean(), num_byzantine=0)[0]
    for found in five_ranks.run(farthest, aggregator=aggregator):
        assert found < 1.2 * of_mean
