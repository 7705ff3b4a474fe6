"""What double momentum costs on the example's network: ``python tests/benchmarks/double_momentum.py``.

Two gloo ranks train the network of ``examples/digits.py`` on images of 28 x 28 pixels, by turns with each estimator.
The time of a step is the median over all turns, batches of the first steps left out; copies count all tensors that the
optimizer and the estimator keep, in units of the parameters.
"""

import argparse
import csv
import logging
import sys
import time
from pathlib import Path
from statistics import median
from typing import Any

import torch

sys.path[:0] = [str(Path(__file__).parents[1]), str(Path(__file__).parents[2] / "examples")]

import lightning.pytorch as pl
from digits import DigitClassifier
from rank_pool import RankPool
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
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
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


def main() -> None:
    """Print the table, and write it to a file if asked to."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--batch_size", type=int, default=32)
    parser.add_argument("--steps", type=int, default=60, help="of one turn")
    parser.add_argument("--turns", type=int, default=5)
    parser.add_argument("--csv", type=Path)
    arguments = parser.parse_args()
    pool = RankPool(arguments.ranks)
    seconds: dict[str, list[float]] = {name: [] for name in ESTIMATORS}
    copies = {}
    for _ in range(arguments.turns):
        for name in ESTIMATORS:
            times, copies[name] = pool.run(measure, name, arguments.batch_size, arguments.steps)[0]
            seconds[name] += times
    pool.close()
    reference = median(seconds["None"])
    rows = [(name, median(seconds[name]) / reference, copies[name]) for name in ESTIMATORS]
    print(f"\nOne step without estimator: {1e3 * reference:.1f} ms\n")
    print("| estimator | time of a step | copies of the parameters |")
    print("|---|---|---|")
    for name, ratio, kept in rows:
        print(f"| `{name}` | {ratio:.2f} | {kept:.0f} |")
    if arguments.csv is not None:
        with arguments.csv.open("w", newline="") as file:
            csv.writer(file).writerows([("estimator", "time_ratio", "copies"), *rows])


if __name__ == "__main__":
    main()
