"""What protection costs when nobody attacks.

The variance over steps of the gradient that the optimizer gets, summed over its coordinates, over that of the plain
mean of the same gradients. Lightning's Trainer runs ``byzantine_ddp`` in a process that acts as all workers, for every
rule and number of workers, f = 1 and the largest f:

- ``nobody attacks``: worker momentum, undone after the aggregation, as the flag has it
- ``bias``: the squared distance of the average gradient from the mean's, in variances of the mean, and some noise
- ``raw gradients``: without momentum
- the last f workers send something that any rule can see; ``Mean of the honest`` is what is left in that case

The first 40 steps, in which the momentum fills up, are not counted. The learning rate is 0, so the point stands still,
and the gradient of each batch is computed once: the loss is its inner product with the parameters. The network is that
of ``examples/digits.py`` with its initial weights, or those after ``--trained`` steps.

``--training`` trains the same network instead, by SGD with momentum, until the loss on training images is under
``--loss``, and counts the steps: of stock DDP with the same batches, and of the rules, each at the best of the learning
rates.
"""

import argparse
import math
import multiprocessing
import os
from collections import deque
from collections.abc import Iterator
from concurrent.futures import Executor, ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cache, partial
from itertools import product
from pathlib import Path
from statistics import mean
from tempfile import TemporaryDirectory
from typing import Any

import lightning.pytorch as pl
import torch
from digits import DigitClassifier, DigitData
from harness import Table, be_quiet
from lightning.pytorch.strategies import DDPStrategy
from reproduction.classifier import Classifier
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader, Dataset

from lightning_byzantine import ByzantineDDPStrategy
from lightning_byzantine.aggregators import (
    CAF,
    CTMA,
    NNM,
    Aggregator,
    CoordinateWiseMedian,
    CoordinateWiseTrimmedMean,
    GeometricMedian,
    Mean,
    MultiKrum,
    PerLayer,
    PersistentFilter,
)
from lightning_byzantine.attacks import Attack, GaussianNoise, Scale
from lightning_byzantine.callbacks import ByzantineSimulation

RULES: dict[str, Aggregator] = {
    "Mean": Mean(),
    "PersistentFilter": PersistentFilter(),
    "CTMA(NNM(GeometricMedian))": CTMA(NNM(GeometricMedian())),
    "NNM(GeometricMedian)": NNM(GeometricMedian()),
    "GeometricMedian": GeometricMedian(),
    "CAF": CAF(),
    "PerLayer(NNM(GeometricMedian))": PerLayer(NNM(GeometricMedian())),
    "PerLayer(CAF)": PerLayer(CAF()),
    "CoordinateWiseTrimmedMean": CoordinateWiseTrimmedMean(),
    "CoordinateWiseMedian": CoordinateWiseMedian(),
    "MultiKrum": MultiKrum(),
}
# Attacks that any rule can see.
CAUGHT: dict[str, Attack] = {"f times -10": Scale(-10.0), "f times noise": GaussianNoise(std=10.0)}
IDEAL = "Mean of the honest"
STOCK = "ddp"
EVALUATED_EVERY = 10
SKIPPED = 40  # until the momentum is full: 0.9^40 = 0.01


@dataclass(frozen=True)
class Run:
    """One run of the Trainer on recorded gradients."""

    workers: int
    num_byzantine: int
    rule: str
    momentum: bool = True
    attack: str | None = None

    @property
    def is_supported(self) -> bool:
        try:
            RULES[self.rule].check(self.workers, self.num_byzantine)
        except ValueError:
            return False
        return True


class Replay(pl.LightningModule):
    """A network whose gradients have been recorded: each batch is one. Keeps what the optimizer receives."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network
        self.received: list[Tensor] = []

    def training_step(self, gradient: Tensor, batch_idx: int) -> Tensor:
        return torch.dot(torch.cat([parameter.flatten() for parameter in self.parameters()]), gradient)

    def on_before_optimizer_step(self, optimizer: torch.optim.Optimizer) -> None:
        self.received.append(gradient_of(self))

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.0)


def gradient_of(module: nn.Module) -> Tensor:
    """Return the gradient of all parameters as one vector."""
    gradients = [parameter.grad for parameter in module.parameters()]
    return torch.cat([gradient.flatten() for gradient in gradients if gradient is not None])


def network(seed: int = 1) -> nn.Module:
    torch.manual_seed(seed)
    return DigitClassifier().network


def training_images(path: str | None) -> Dataset[Any]:
    data = DigitData(path, validation=0)
    data.prepare_data()
    data.setup("fit")
    return data.train_set


def record(
    images: Dataset[Any], num_steps: int, num_workers: int, batch_size: int, num_trained: int = 0, seed: int = 0
) -> Tensor:
    """Return the gradients of batches drawn at random, [steps, workers, d], after some steps of training."""
    net, generator = network(), torch.Generator().manual_seed(seed)
    optimizer = torch.optim.SGD(net.parameters(), lr=0.02, momentum=0.9)
    pixels, labels = images[:]

    def differentiate(size: int) -> Tensor:
        batch = torch.randint(len(labels), (size,), generator=generator)
        net.zero_grad()
        cross_entropy(net(pixels[batch]), labels[batch]).backward()
        return gradient_of(net)

    for _ in range(num_trained):
        differentiate(8 * batch_size)
        optimizer.step()
    gradients = torch.empty(num_steps, num_workers, sum(parameter.numel() for parameter in net.parameters()))
    for step, worker in product(range(num_steps), range(num_workers)):
        gradients[step, worker] = differentiate(batch_size)
    return gradients


def received(run: Run, gradients: Tensor) -> Tensor:
    """Return what the optimizer gets, [steps, d], if the first workers have these gradients, [steps, workers, d]."""
    strategy = ByzantineDDPStrategy(
        RULES[run.rule],
        run.num_byzantine,
        estimator="auto" if run.momentum else None,
        workers_per_process=run.workers,
    )
    liars = range(run.workers - run.num_byzantine, run.workers)
    attacks = [] if run.attack is None else [ByzantineSimulation(CAUGHT[run.attack], liars)]
    model = Replay(network())
    batches: Any = [gradient for step in gradients for gradient in step[: run.workers]]
    trainer(strategy, attacks).fit(model, DataLoader(batches, batch_size=None))
    return torch.stack(model.received)


def trainer(strategy: Any, callbacks: list[Any], **options: Any) -> pl.Trainer:
    """Return a quiet Trainer in this process."""
    return pl.Trainer(
        strategy=strategy,
        accelerator="cpu",
        devices=1,
        callbacks=callbacks,
        max_epochs=1,
        logger=False,
        use_distributed_sampler=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        **options,
    )


def variance(rows: Tensor) -> float:
    """Return the variance over rows, added up over columns."""
    return float(rows.double().var(dim=0).sum())


def ratio_and_bias(run: Run, gradients: Tensor) -> tuple[float, float]:
    """Return the variance of what the optimizer gets, and its squared bias, over the variance of the mean."""
    means, own = gradients[SKIPPED:, : run.workers].mean(dim=1), received(run, gradients)[SKIPPED:]
    bias = float((own.double().mean(dim=0) - means.double().mean(dim=0)).square().sum())
    return variance(own) / variance(means), bias / variance(means)


def prices(run: Run, gradients: Tensor) -> list[float]:
    """Return a row of the table."""
    raw, caught = replace(run, momentum=False), [replace(run, attack=name) for name in CAUGHT]
    rest = [ratio_and_bias(each, gradients)[0] for each in (raw, *caught)]
    return [*ratio_and_bias(run, gradients), *rest]


def ideal(num_workers: int, num_byzantine: int, gradients: Tensor) -> float:
    """Return the variance of the mean of the honest workers over that of all."""
    counted = gradients[SKIPPED:, :num_workers]
    return variance(counted[:, : num_workers - num_byzantine].mean(dim=1)) / variance(counted.mean(dim=1))


class Until(pl.Callback):
    """Ends training when the loss on some training images, in the mean of five evaluations, is low enough, or NaN."""

    def __init__(self, images: tuple[Tensor, Tensor], loss: float) -> None:
        self.images = images
        self.loss = loss
        self.steps = math.inf
        self.evaluated = 0
        self.losses: deque[float] = deque(maxlen=5)

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *_: Any) -> None:
        if trainer.global_step < self.evaluated + EVALUATED_EVERY:
            return
        self.evaluated = trainer.global_step
        pixels, labels = self.images
        pl_module.eval()
        with torch.no_grad():
            self.losses.append(float(cross_entropy(pl_module.network(pixels), labels)))
        pl_module.train()
        loss = mean(self.losses)
        if loss <= self.loss:
            self.steps = trainer.global_step
        trainer.should_stop = loss <= self.loss or math.isnan(loss)


@dataclass(frozen=True)
class Training:
    """One run of the Trainer on images."""

    rule: str  # or stock DDP
    learning_rate: float
    seed: int
    workers: int
    batch_size: int
    loss: float
    most_steps: int


def steps_to_loss(run: Training, images: Dataset[Any]) -> float:
    """Return after how many steps the loss was low enough; infinity for never."""
    generator = torch.Generator().manual_seed(run.seed)
    pixels, labels = images[:]
    batches = torch.randint(len(labels), (run.most_steps * run.workers, run.batch_size), generator=generator)
    strategy: Any = DDPStrategy()
    if run.rule != STOCK:
        strategy = ByzantineDDPStrategy(RULES[run.rule], workers_per_process=run.workers)
    until = Until((pixels[:2000], labels[:2000]), run.loss)
    runner = trainer(strategy, [until], accumulate_grad_batches=run.workers, limit_val_batches=0)
    model = Classifier(network(run.seed), run.learning_rate, momentum=0.9)
    runner.fit(model, DataLoader(images, batch_sampler=batches.tolist()))
    return until.steps


def largest(num_workers: int) -> int:
    """Return the largest f."""
    return (num_workers - 1) // 2


@contextmanager
def processes(number: int) -> Iterator[Executor]:
    """Give new processes, each of which computes on one thread."""
    os.environ["OMP_NUM_THREADS"] = "1"  # otherwise Lightning gives all cores to each
    with ProcessPoolExecutor(number, multiprocessing.get_context("spawn")) as pool:
        yield pool


@cache
def recorded(path: Path) -> Tensor:
    gradients: Tensor = torch.load(path, mmap=True)
    return gradients


def prices_of_recorded(path: Path, run: Run) -> list[float]:
    be_quiet()
    return prices(run, recorded(path))


def steps_of(path: str | None, run: Training) -> float:
    be_quiet()
    return steps_to_loss(run, training_images(path))


def add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--data", help="an mnist.npz in the layout of Keras; without one, scikit-learn's digits")
    parser.add_argument("--rules", nargs="+", choices=RULES, default=list(RULES), metavar="RULE")
    parser.add_argument("--workers", nargs="+", type=int, default=[5, 8, 16, 64])
    parser.add_argument("--batch-size", type=int, default=4, help="of one worker")
    parser.add_argument("--steps", type=int, default=100, help="that are counted")
    parser.add_argument("--trained", type=int, default=0, help="steps of training before the point stands still")
    parser.add_argument("--jobs", type=int, default=os.cpu_count(), help="processes at a time")
    parser.add_argument("--csv", type=Path)
    parser.add_argument("--training", action="store_true", help="count steps to a loss instead")
    parser.add_argument("--loss", type=float, default=0.1)
    parser.add_argument("--learning-rates", nargs="+", type=float, default=[0.001, 0.003, 0.01])
    parser.add_argument("--seeds", nargs="+", type=int, default=[1, 2, 3])
    parser.add_argument("--most-steps", type=int, default=1000)


def run(arguments: argparse.Namespace) -> None:
    if arguments.training:
        run_training(arguments)
        return
    numbers = [(m, f) for m in arguments.workers for f in dict.fromkeys([1, largest(m)])]
    runs = [Run(*number, rule) for number in numbers for rule in arguments.rules]
    runs = [run for run in runs if run.is_supported]
    columns = {"workers": "{}", "f": "{}", "rule": "`{}`", "nobody attacks": "{:.2f}", "bias": "{:.2f}"}
    columns |= dict.fromkeys(["raw gradients", *CAUGHT], "{:.2f}")
    with TemporaryDirectory() as folder, processes(arguments.jobs) as pool:
        path, num_steps = Path(folder) / "gradients.pt", SKIPPED + arguments.steps
        images = training_images(arguments.data)
        gradients = record(images, num_steps, max(arguments.workers), arguments.batch_size, arguments.trained)
        torch.save(gradients, path)
        table, unattacked = Table(columns, arguments.csv), {}
        for each, row in zip(runs, pool.map(partial(prices_of_recorded, path), runs), strict=True):
            if each.rule == arguments.rules[0]:
                best = ideal(each.workers, each.num_byzantine, gradients)
                table.add(each.workers, each.num_byzantine, IDEAL, 1.0, 0.0, 1.0, *[best] * len(CAUGHT))
            table.add(each.workers, each.num_byzantine, each.rule, *row)
            unattacked[each] = f"{row[0]:.2f} ({row[2]:.2f})"
    print("\nNobody attacks, the largest f; in brackets raw gradients\n")
    table = Table({"rule": "`{}`"} | {f"m = {m}": "{}" for m in arguments.workers})
    for rule in arguments.rules:
        table.add(rule, *[unattacked.get(Run(m, largest(m), rule), "") for m in arguments.workers])


def run_training(arguments: argparse.Namespace) -> None:
    columns = {"workers": "{}", "rule": "`{}`", "steps": "{:.0f}", "against stock": "{:.2f}", "learning rate": "{:g}"}
    table = Table(columns, arguments.csv)
    rest = (arguments.batch_size, arguments.loss, arguments.most_steps)
    with processes(arguments.jobs) as pool:
        for workers in arguments.workers:
            keys = list(product([STOCK, *arguments.rules], arguments.learning_rates, arguments.seeds))
            runs = [Training(*key, workers, *rest) for key in keys]
            steps = dict(zip(keys, pool.map(partial(steps_of, arguments.data), runs), strict=True))
            stock = math.nan
            for rule in [STOCK, *arguments.rules]:
                means = {
                    rate: mean(steps[rule, rate, seed] for seed in arguments.seeds) for rate in arguments.learning_rates
                }
                best = min(means, key=lambda rate: means[rate])
                stock = means[best] if rule == STOCK else stock
                table.add(workers, rule, means[best], means[best] / stock, best)
