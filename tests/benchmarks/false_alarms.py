"""How often honest workers come under suspicion, and whether one is ever expelled.

Five honest workers train the example's network on its digits, in one process, under
``ByzantineMonitor(on_suspect="quarantine")``. Their data are

- ``re-dealt``: a random fifth of the images, another one in every epoch
- ``shards of 80``, ``shards of 800``: so many random images of each worker's own, for good; two may have some in common
- ``Dirichlet(0.3)``: each worker has its own proportions of the classes
- ``half the batch``: as ``re-dealt``, but worker 3 has batches of half the size

Each run is a row, written as soon as it ends: who was under suspicion by statistics, after how many steps first, and
who was expelled. Runs that the CSV file has already are not repeated. Then comes, for each setting, in how many runs
there was a suspect, and in how many an honest worker was expelled, which needs proof, and so must be 0.
"""

import argparse
import csv
import tempfile
import time
from dataclasses import astuple, dataclass, fields
from itertools import product
from pathlib import Path

import lightning.pytorch as pl
import numpy as np
import torch
from digits import DigitClassifier, DigitData
from harness import Table, be_quiet, ranks
from partitions import IID, Dirichlet, Partition
from torch import Tensor

from lightning_byzantine import ByzantineDDPStrategy
from lightning_byzantine.callbacks import ByzantineMonitor

NUM_WORKERS, WITH_HALF = 5, 3


class Shards(Partition):
    """Each worker has so many random images for good, as often as it needs for an epoch as long as the others'."""

    def __init__(self, size: int, seed: int) -> None:
        self.size = size
        self.seed = seed

    def split(self, labels: np.ndarray, num_workers: int, generator: np.random.Generator) -> np.ndarray:
        own = np.random.default_rng(self.seed)
        shards = [own.choice(len(labels), self.size, replace=False) for _ in range(num_workers)]
        return np.stack([np.resize(generator.permutation(shard), len(labels) // num_workers) for shard in shards])


class HalfABatch(DigitClassifier):
    """Of one worker."""

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        images, labels = batch
        size = len(labels) // 2 if batch_idx % NUM_WORKERS == WITH_HALF else len(labels)
        return super().training_step((images[:size], labels[:size]), batch_idx)


SETTINGS = {
    "re-dealt": lambda seed: IID(),
    "shards of 80": lambda seed: Shards(80, seed),
    "shards of 800": lambda seed: Shards(800, seed),
    "Dirichlet(0.3)": lambda seed: Dirichlet(0.3, seed),
    "half the batch": lambda seed: IID(),
}


@dataclass
class Run:
    setting: str
    seed: int
    suspects: str = ""
    first: str = ""
    expelled: str = ""
    seconds: float = float("nan")


class Watch(pl.Callback):
    """Keeps after which step each worker was first under suspicion."""

    def __init__(self, monitor: ByzantineMonitor) -> None:
        self.monitor = monitor
        self.first: dict[int, int] = {}

    def on_train_batch_end(self, trainer: pl.Trainer, *_: object) -> None:
        for worker in self.monitor.suspects:
            self.first.setdefault(worker, trainer.global_step)


def train(run: Run, steps: int, batch_size: int, threshold: float) -> Run:
    be_quiet()
    pl.seed_everything(run.seed, verbose=False)
    torch.set_num_threads(1)
    began = time.monotonic()
    strategy = ByzantineDDPStrategy(workers_per_process=NUM_WORKERS)
    watch = Watch(ByzantineMonitor(on_suspect="quarantine", every_n_steps=10**9, threshold=threshold))
    with tempfile.TemporaryDirectory() as folder:
        trainer = pl.Trainer(
            strategy=strategy,
            accelerator="cpu",
            devices=1,
            max_steps=steps,
            max_epochs=-1,
            limit_val_batches=0,
            default_root_dir=folder,
            callbacks=[watch.monitor, watch],
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            use_distributed_sampler=False,
        )
        model = HalfABatch() if run.setting == "half the batch" else DigitClassifier()
        trainer.fit(model, DigitData(batch_size=batch_size, partition=SETTINGS[run.setting](run.seed)))
    found = sorted(watch.first.items())
    run.suspects = " ".join(str(worker) for worker, _ in found)
    run.first = " ".join(str(step) for _, step in found)
    run.expelled = " ".join(map(str, sorted(strategy.quarantined)))
    run.seconds = time.monotonic() - began
    return run


def add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--settings", nargs="+", choices=SETTINGS, default=list(SETTINGS))
    parser.add_argument("--seeds", nargs="+", type=int, default=list(range(1, 21)))
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--batch-size", type=int, default=4)
    parser.add_argument("--threshold", type=float, default=ByzantineMonitor().threshold)
    parser.add_argument("--csv", type=Path, help="of the runs; those that it has are not repeated")


def run(arguments: argparse.Namespace) -> None:
    runs = [] if arguments.csv is None or not arguments.csv.exists() else _read(arguments.csv)
    done = {(each.setting, each.seed) for each in runs}
    print("\t".join(field.name for field in fields(Run)))
    with ranks(1) as pool:
        for setting, seed in product(arguments.settings, arguments.seeds):
            if (setting, seed) in done:
                continue
            (each,) = pool.run(train, Run(setting, seed), arguments.steps, arguments.batch_size, arguments.threshold)
            runs.append(each)
            print("\t".join(map(str, astuple(each))), flush=True)
            if arguments.csv is not None:
                _append(arguments.csv, each)
    print_rates(runs)


def print_rates(runs: list[Run]) -> None:
    print()
    table = Table(dict.fromkeys(["setting", "runs", "with a suspect", "with one expelled"], "{}"))
    for setting in dict.fromkeys(each.setting for each in runs):
        same = [each for each in runs if each.setting == setting]
        suspected, expelled = (sum(bool(one) for one in column) for column in _columns(same))
        table.add(setting, len(same), suspected, expelled)


def _columns(runs: list[Run]) -> tuple[list[str], list[str]]:
    return [each.suspects for each in runs], [each.expelled for each in runs]


def _read(path: Path) -> list[Run]:
    with path.open(newline="") as file:
        rows = list(csv.DictReader(file))
    return [Run(**row | {"seed": int(row["seed"]), "seconds": float(row["seconds"])}) for row in rows]


def _append(path: Path, each: Run) -> None:
    is_new = not path.exists()
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a", newline="") as file:
        writer = csv.writer(file)
        if is_new:
            writer.writerow(field.name for field in fields(Run))
        writer.writerow(astuple(each))
