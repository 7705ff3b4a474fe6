"""What `ByzantineMonitor` adds to a step.

Five gloo processes train the example's network on its digits with the default strategy and a TensorBoard logger. The
monitor watches for 50 steps, in which it logs once, then looks away for 50, and so on. Printed is the median,
over the watched periods, of their times as ratios to the mean of the two beside them, on rank 0, with its interval of
95% confidence (order statistics). A picture drawn when a period is over adds to that one.
"""

import argparse
import math
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

import lightning.pytorch as pl
from digits import DigitClassifier, DigitData
from harness import Table, be_quiet, ranks
from lightning.pytorch.loggers import TensorBoardLogger
from partitions import IID
from torch.utils.hooks import RemovableHandle
from training import trainer

from lightning_byzantine import ByzantineDDPStrategy
from lightning_byzantine.aggregators import Report
from lightning_byzantine.callbacks import ByzantineMonitor

NUM_RANKS, PERIOD = 5, 50


class Observed(ByzantineDDPStrategy):
    """Can be observed with interruptions."""

    def observe(self, observer: Callable[[Report], None]) -> RemovableHandle:
        self.observer, self.handle = observer, super().observe(observer)
        return self.handle

    def interrupt(self) -> None:
        self.handle.remove()

    def resume(self) -> None:
        self.handle = super().observe(self.observer)


class NowAndThen(ByzantineMonitor):
    """Looks away in every second period, and takes the time of all."""

    def __init__(self) -> None:
        super().__init__(every_n_steps=PERIOD)
        self.seconds: dict[bool, list[float]] = {True: [], False: []}
        self.watching = True
        self.began = time.perf_counter()

    def on_train_batch_end(self, trainer: pl.Trainer, *arguments: Any) -> None:
        if self.watching:
            super().on_train_batch_end(trainer, *arguments)
        if trainer.global_step % PERIOD == 0:
            assert isinstance(trainer.strategy, Observed)
            self.seconds[self.watching].append(time.perf_counter() - self.began)
            self.watching = not self.watching
            if self.watching:
                trainer.strategy.resume()
            else:
                trainer.strategy.interrupt()
            self.began = time.perf_counter()

    def on_train_epoch_end(self, *arguments: Any) -> None:
        began = time.perf_counter()
        super().on_train_epoch_end(*arguments)
        if not self.watching:
            taken = time.perf_counter() - began
            self.seconds[True][-1] += taken
            self.began += taken


def train(periods: int, folder: Path) -> dict[bool, list[float]]:
    """Train as one rank of all; return seconds of the periods, by whether the monitor watches."""
    be_quiet()
    monitor = NowAndThen()
    trainer(
        Observed(),
        max_steps=2 * PERIOD * (periods + 2),
        max_epochs=-1,
        limit_val_batches=0,
        callbacks=[monitor],
        logger=TensorBoardLogger(folder),
        use_distributed_sampler=False,
    ).fit(DigitClassifier(), DigitData(batch_size=32, partition=IID()))
    return {watching: seconds[1:] for watching, seconds in monitor.seconds.items()}  # the first ones warm up


def add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--periods", type=int, default=150, help="of each kind")
    parser.add_argument("--csv", type=Path)


def run(arguments: argparse.Namespace) -> None:
    with ranks(NUM_RANKS) as pool, tempfile.TemporaryDirectory() as name:
        seconds = pool.run(train, arguments.periods, Path(name))[0]
    watched, alone = seconds[True], seconds[False]
    ratios = [time / (before + after) * 2 for before, time, after in zip(alone, watched[1:], alone[1:], strict=False)]
    ordered, away = sorted(ratios), math.ceil(1.96 * math.sqrt(len(ratios)) / 2)
    middle = len(ratios) // 2
    low, high = ordered[max(0, middle - away)], ordered[min(len(ratios) - 1, middle + away)]
    columns = {"step without the monitor, ms": "{:.1f}", "ratio with it": "{:.3f}", "95% from": "{:.3f}"}
    table = Table(columns | {"to": "{:.3f}", "periods": "{}"}, arguments.csv)
    table.add(1e3 * median(alone) / PERIOD, median(ratios), low, high, len(ratios))
