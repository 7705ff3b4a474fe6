"""What `ByzantineMonitor` adds to a step: ``python tests/benchmarks/monitor.py``.

Five gloo processes train the example's network on its digits with the default strategy and a TensorBoard logger. The
monitor watches for 50 steps, in which it logs once, then looks away for 50, and so on. Printed is the median,
over the watched periods, of their times as ratios to the mean of the two beside them, on rank 0, with its interval of
95% confidence (order statistics). A picture drawn when a period is over adds to that one.
"""

import argparse
import logging
import math
import sys
import tempfile
import time
import warnings
from pathlib import Path
from statistics import median
from typing import Any

sys.path[:0] = [str(Path(__file__).parents[i]) for i in (1, 2)] + [str(Path(__file__).parents[2] / "examples")]

import lightning.pytorch as pl
import rank_pool
from digits import DigitClassifier, DigitData
from lightning.pytorch.loggers import TensorBoardLogger
from partitions import IID

from lightning_byzantine import ByzantineDDPStrategy
from lightning_byzantine.callbacks import ByzantineMonitor

NUM_RANKS, PERIOD = 5, 50


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
            assert isinstance(trainer.strategy, ByzantineDDPStrategy)
            self.seconds[self.watching].append(time.perf_counter() - self.began)
            self.watching = not self.watching
            trainer.strategy.observers[:] = [self._reports.append] if self.watching else []
            self.began = time.perf_counter()

    def on_train_epoch_end(self, *arguments: Any) -> None:
        began = time.perf_counter()
        super().on_train_epoch_end(*arguments)
        if not self.watching:
            taken = time.perf_counter() - began
            self.seconds[True][-1] += taken
            self.began += taken


def train(periods: int, folder: Path) -> dict[bool, list[float]]:
    warnings.simplefilter("ignore")
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    monitor = NowAndThen()
    trainer = pl.Trainer(
        strategy=ByzantineDDPStrategy(),
        accelerator="cpu",
        devices=NUM_RANKS,
        max_steps=2 * PERIOD * (periods + 2),
        max_epochs=-1,
        limit_val_batches=0,
        callbacks=[monitor],
        logger=TensorBoardLogger(folder),
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        use_distributed_sampler=False,
    )
    trainer.fit(DigitClassifier(), DigitData(batch_size=32, partition=IID()))
    return {watching: seconds[1:] for watching, seconds in monitor.seconds.items()}  # the first ones warm up


def main() -> None:
    """Print the ratio."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--periods", type=int, default=150, help="of each kind")
    arguments = parser.parse_args()
    rank_pool.TIMEOUT = 1800.0
    pool = rank_pool.RankPool(NUM_RANKS)
    with tempfile.TemporaryDirectory() as name:
        seconds = pool.run(train, arguments.periods, Path(name))[0]
    pool.close()
    watched, alone = seconds[True], seconds[False]
    ratios = [time / (before + after) * 2 for before, time, after in zip(alone, watched[1:], alone[1:], strict=False)]
    ordered, away = sorted(ratios), math.ceil(1.96 * math.sqrt(len(ratios)) / 2)
    middle = len(ratios) // 2
    print(
        f"A step takes {1000 * median(alone) / PERIOD:.1f} ms, and {median(ratios):.3f} times as long with the monitor"
        f" (95% confidence: {ordered[max(0, middle - away)]:.3f} to {ordered[min(len(ratios) - 1, middle + away)]:.3f},"
        f" {len(ratios)} periods)."
    )


if __name__ == "__main__":
    main()
