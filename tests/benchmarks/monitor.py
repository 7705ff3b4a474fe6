"""What `ByzantineMonitor` adds to a step, or an audit to training.

Five gloo processes train the example's network on its digits with the default strategy and a TensorBoard logger. The
monitor watches for 50 steps, in which it logs once, then looks away for 50, and so on. Printed is the median,
over the watched periods, of their times as ratios to the mean of the two beside them, on rank 0, with its interval of
95% confidence (order statistics). A picture drawn when a period is over adds to that one.

``--audits`` does the same with an audit in every second period, with its eight steps of which it takes place in one,
instead of the monitor; then comes how many steps' time an audit takes.
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


class Periods(pl.Callback):
    """Switches something on and off in turns, and takes the time of all periods."""

    def __init__(self, switch: Callable[[Observed, bool], object]) -> None:
        self.switch = switch
        self.seconds: dict[bool, list[float]] = {True: [], False: []}
        self.is_on = True
        self.began = time.perf_counter()

    def on_train_batch_end(self, trainer: pl.Trainer, *_: Any) -> None:
        if trainer.global_step % PERIOD == 0:
            assert isinstance(trainer.strategy, Observed)
            self.seconds[self.is_on].append(time.perf_counter() - self.began)
            self.is_on = not self.is_on
            self.switch(trainer.strategy, self.is_on)
            self.began = time.perf_counter()

    def belongs_to_last(self, seconds: float) -> None:
        """Take some of this period's time for the one before."""
        self.seconds[not self.is_on][-1] += seconds
        self.began += seconds


class NowAndThen(ByzantineMonitor):
    """Looks away in every second period."""

    def __init__(self) -> None:
        super().__init__(every_n_steps=PERIOD)
        self.periods = Periods(lambda strategy, is_on: strategy.resume() if is_on else strategy.interrupt())

    def on_train_batch_end(self, trainer: pl.Trainer, *arguments: Any) -> None:
        if self.periods.is_on:
            super().on_train_batch_end(trainer, *arguments)

    def on_train_epoch_end(self, *arguments: Any) -> None:
        began = time.perf_counter()
        super().on_train_epoch_end(*arguments)
        if not self.periods.is_on:
            self.periods.belongs_to_last(time.perf_counter() - began)


def train(audits: bool, periods: int, folder: Path) -> dict[bool, list[float]]:
    """Train as one rank of all; return seconds of the periods, by whether what is measured was on."""
    be_quiet()
    if audits:
        clock = Periods(lambda strategy, is_on: strategy.audit(3) if is_on else None)
        callbacks: list[pl.Callback] = [clock]
    else:
        monitor = NowAndThen()
        clock, callbacks = monitor.periods, [monitor, monitor.periods]
    trainer(
        Observed(),
        max_steps=2 * PERIOD * (periods + 2),
        max_epochs=-1,
        limit_val_batches=0,
        callbacks=callbacks,
        logger=TensorBoardLogger(folder),
        use_distributed_sampler=False,
    ).fit(DigitClassifier(), DigitData(batch_size=32, partition=IID()))
    return {is_on: seconds[1:] for is_on, seconds in clock.seconds.items()}  # the first ones warm up


def add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--periods", type=int, default=150, help="of each kind")
    parser.add_argument("--audits", action="store_true", help="measure audits instead of the monitor")
    parser.add_argument("--csv", type=Path)


def run(arguments: argparse.Namespace) -> None:
    with ranks(NUM_RANKS) as pool, tempfile.TemporaryDirectory() as name:
        seconds = pool.run(train, arguments.audits, arguments.periods, Path(name))[0]
    switched, plain = seconds[True], seconds[False]
    ratios = [time / (before + after) * 2 for before, time, after in zip(plain, switched[1:], plain[1:], strict=False)]
    ordered, away = sorted(ratios), math.ceil(1.96 * math.sqrt(len(ratios)) / 2)
    middle = len(ratios) // 2
    low, high = ordered[max(0, middle - away)], ordered[min(len(ratios) - 1, middle + away)]
    what = "an audit" if arguments.audits else "the monitor"
    columns = {f"step without {what}, ms": "{:.1f}", "ratio with it": "{:.3f}", "95% from": "{:.3f}"}
    table = Table(columns | {"to": "{:.3f}", "periods": "{}"}, arguments.csv)
    table.add(1e3 * median(plain) / PERIOD, median(ratios), low, high, len(ratios))
    if arguments.audits:
        in_steps = [PERIOD * (ratio - 1) for ratio in (median(ratios), low, high)]
        print("\nAn audit takes {:.1f} steps' time ({:.1f} to {:.1f}).".format(*in_steps))
