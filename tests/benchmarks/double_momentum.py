"""What double momentum costs on the example's network.

Two gloo ranks train the network of ``examples/digits.py`` on images of 28 x 28 pixels, by turns with each estimator.
The time of a step is the median over all turns, batches of the first steps left out; copies count all tensors that the
optimizer and the estimator keep, in units of the parameters.
"""

import argparse
import time
from pathlib import Path
from statistics import median
from typing import Any

import lightning.pytorch as pl
import torch
from digits import DigitClassifier
from harness import Table, be_quiet, ranks
from torch import Tensor
from torch.utils.data import DataLoader, TensorDataset
from training import trainer

from lightning_byzantine import ByzantineDDPStrategy
from lightning_byzantine.estimators import WorkerMomentum
from lightning_byzantine.optim import DoubleMomentumEstimator

ESTIMATORS = {
    "None": lambda: None,
    "WorkerMomentum()": lambda: WorkerMomentum(),
    "DoubleMomentumEstimator()": lambda: DoubleMomentumEstimator(weighted=False),
}
WARM_UP = 5


class Clock(pl.Callback):
    """Takes the time from the end of a batch to the end of the next one."""

    def __init__(self) -> None:
        self.ends: list[float] = []

    def on_train_batch_end(self, *_: Any) -> None:
        self.ends.append(time.perf_counter())


def measure(name: str, batch_size: int, steps: int) -> tuple[list[float], float]:
    """Return seconds a step, and how many copies of the parameters are kept beside them."""
    be_quiet()
    pl.seed_everything(1, verbose=False)
    images = torch.randn(batch_size * (steps + WARM_UP) * torch.distributed.get_world_size(), 1, 28, 28)
    data = TensorDataset(images, torch.randint(10, (len(images),)))
    clock, model = Clock(), DigitClassifier(lr=0.01, momentum=0.0)
    strategy = ByzantineDDPStrategy(estimator=ESTIMATORS[name]())
    runner = trainer(strategy, callbacks=[clock])
    runner.fit(model, DataLoader(data, batch_size))
    kept = list(tensors_of([dict(optimizer.state) for optimizer in runner.optimizers]))
    if strategy.estimator is not None:
        kept += [*strategy.estimator.worker_state().values(), *strategy.estimator.shared_state().values()]
    parameters = sum(parameter.numel() for parameter in model.parameters())
    seconds = [end - start for start, end in zip(clock.ends[WARM_UP:], clock.ends[WARM_UP + 1 :], strict=False)]
    return seconds, sum(tensor.numel() for tensor in kept) / parameters


def tensors_of(value: Any) -> list[Tensor]:
    """Return all tensors in nested dicts and lists."""
    if isinstance(value, Tensor):
        return [value]
    if isinstance(value, dict):
        value = list(value.values())
    return [tensor for item in value for tensor in tensors_of(item)] if isinstance(value, list) else []


def add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--steps", type=int, default=60, help="of one turn")
    parser.add_argument("--turns", type=int, default=5)
    parser.add_argument("--csv", type=Path)


def run(arguments: argparse.Namespace) -> None:
    seconds: dict[str, list[float]] = {name: [] for name in ESTIMATORS}
    copies = {}
    with ranks(arguments.ranks) as pool:
        for _ in range(arguments.turns):
            for name in ESTIMATORS:
                times, copies[name] = pool.run(measure, name, arguments.batch_size, arguments.steps)[0]
                seconds[name] += times
    columns = {"estimator": "`{}`", "time of a step": "{:.2f}", "copies of the parameters": "{:.0f}", "ms": "{:.1f}"}
    table = Table(columns, arguments.csv)
    for name in ESTIMATORS:
        taken = median(seconds[name])
        table.add(name, taken / median(seconds["None"]), copies[name], 1e3 * taken)
