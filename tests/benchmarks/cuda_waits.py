"""What makes the processor wait for the device in a step, and where, and how many kernels a step has."""

import os
import traceback
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import islice
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from cuda_times import gpu_profiler, kernels_in, rules
from cuda_training import Classifier, double_momentum, loader
from harness import Table
from lightning.pytorch.strategies import DDPStrategy
from on_cuda import Section

from lightning_byzantine import ByzantineDDPStrategy
from lightning_byzantine.aggregators import CAF, CTMA, NNM, CoordinateWiseMedian, Mean
from lightning_byzantine.attacks import SignFlip
from lightning_byzantine.callbacks import ByzantineMonitor, ByzantineSimulation

PACKAGE = f"{os.sep}lightning_byzantine{os.sep}"
NUM_WORKERS = 8
FIRST, STEPS = 2, 4


class Waits(pl.Callback):
    """Counts waits of some optimizer steps by the place in the code, and kernels."""

    def __init__(self) -> None:
        self.places: Counter[str] = Counter()
        self.num_kernels = 0
        self._profiler: Any = None

    def on_train_batch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *_: Any) -> None:
        # Not within the first steps, in which DDP rebuilds its buckets.
        if torch.cuda.is_available() and trainer.global_step == FIRST and self._profiler is None:
            self._profiler = gpu_profiler()
            self._profiler.start()
            torch.cuda.set_sync_debug_mode("warn")

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if torch.cuda.is_available():
            torch.cuda.set_sync_debug_mode("default")
            torch.cuda.synchronize()
            self._profiler.stop()
            self.num_kernels = sum(event.count for event in kernels_in(self._profiler))

    def note(self, message: Any, *_: Any, **__: Any) -> None:
        """Take a warning's place."""
        if "called a synchronizing" not in str(message):  # nor that this mode is a prototype
            return
        frames = [frame for frame in traceback.extract_stack() if PACKAGE in frame.filename]
        if not frames:
            self.places["outside of this package"] += 1
            return
        shown = [f"{Path(frame.filename).stem}:{frame.lineno}" for frame in reversed(frames[-3:])]
        self.places[" < ".join(shown)] += 1


@contextmanager
def noted(waits: Waits) -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.simplefilter("always")
        warnings.showwarning = waits.note
        yield


def run(section: Section) -> None:
    columns = {"training": "{}", "precision": "{}", "waits a step": "{:.2f}", "where": "`{}`", "kernels a step": "{}"}
    table = section.table(columns)
    for name, precision, strategy, callbacks in configurations():
        with section.attempt(name):
            waits = Waits()
            trainer = pl.Trainer(
                accelerator=section.device.type,
                devices=1,
                strategy=strategy(),
                precision=precision,
                callbacks=[*callbacks(), waits],
                accumulate_grad_batches=NUM_WORKERS,
                max_steps=FIRST + STEPS,
                max_epochs=-1,
                logger=False,
                enable_checkpointing=False,
                enable_progress_bar=False,
                enable_model_summary=False,
            )
            with noted(waits):
                trainer.fit(Classifier(), loader(FIRST + STEPS))
            add(table, [name, precision], waits)
    if section.device.type == "cuda":
        with section.attempt("waits of rules"):
            of_rules(section)


def configurations() -> Iterator[tuple[str, Any, Callable[[], Any], Callable[[], list[pl.Callback]]]]:
    def byzantine(*rule: Any, **arguments: Any) -> Callable[[], ByzantineDDPStrategy]:
        return lambda: ByzantineDDPStrategy(*rule, workers_per_process=NUM_WORKERS, **arguments)

    yield "stock ddp", "32-true", DDPStrategy, list
    yield "Mean", "32-true", byzantine(Mean()), list
    yield "default", "32-true", byzantine(), list
    yield "default, monitor", "32-true", byzantine(), lambda: [ByzantineMonitor(every_n_steps=10)]
    yield "default, attack", "32-true", byzantine(), lambda: [ByzantineSimulation(SignFlip(), workers=[0])]
    yield "default, clipped", "32-true", byzantine(max_worker_grad_norm=1.0), list
    yield "CTMA(NNM(CoordinateWiseMedian))", "32-true", byzantine(CTMA(NNM(CoordinateWiseMedian()))), list
    yield "CAF", "32-true", byzantine(CAF()), list
    yield "double momentum", "32-true", byzantine(estimator=double_momentum()), list
    yield "default", "16-mixed", byzantine(), list
    yield "stock ddp", "16-mixed", DDPStrategy, list


def of_rules(section: Section) -> None:
    """Count the waits of one call of each rule."""
    table = section.table({"rule": "`{}`", "waits": "{:.0f}", "where": "`{}`"}, "_rules")
    vectors = torch.randn(17, 100_000, device=section.device)
    for name, rule in rules().items():
        waits = Waits()
        rule(vectors, 8)
        with noted(waits):
            torch.cuda.set_sync_debug_mode("warn")
            rule(vectors, 8)
            torch.cuda.set_sync_debug_mode("default")
        table.add(name, sum(waits.places.values()), "; ".join(f"{n} x {where}" for where, n in waits.places.items()))


def add(table: Table, training: list[str], waits: Waits) -> None:
    table.add(*training, sum(waits.places.values()) / STEPS, "all places", round(waits.num_kernels / STEPS))
    for place, count in islice(waits.places.most_common(), 12):
        table.add(*training, count / STEPS, place, "")
