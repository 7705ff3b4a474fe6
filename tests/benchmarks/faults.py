"""What each fault of one worker costs, and how soon it is named.

Five gloo processes train the example's network on its digits, and one of them, rank 0 or another, is faulty from the
first step on (``NaN once``, ``SIGKILL`` and ``SIGSTOP``: in step 20 only).

- ``accuracy``: on the test images, as ``self.log(sync_dist=True)`` with ``robust_metrics=True`` has it in the end; of
  killed and stopped ranks, that of the run resumed from the last checkpoint
- ``against clean``: the difference to the clean run of the same seed, in points
- ``named after``: steps until ``ByzantineMonitor`` suspects the faulty worker; of killed and stopped ranks, whether
  every survivor's ``WorkerLostError`` names it
- ``proved after``: steps until there is proof that it is faulty
- ``audit``: what the last audit of it said
- ``others named``, ``others proved``: false alarms

for each faulty rank and, within these, for each seed.

Then come the runs that are more than 3 points worse than clean, persistent faults that were named late or never, and
false alarms.

``--clean-steps`` trains eight workers without any fault, in one process, and prints who was suspected all the same.
"""

import argparse
import json
import multiprocessing
import os
import signal
import socket
import sys
import tempfile
import time
from dataclasses import astuple, dataclass, fields
from datetime import timedelta
from itertools import product
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from digits import DigitClassifier, DigitData
from harness import Table, be_quiet, ranks
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.strategies import StrategyRegistry
from partitions import IID
from rank_pool import RankPool
from torch import Tensor

import lightning_byzantine  # noqa: F401  # registers the strategies
from lightning_byzantine.attacks import (
    Attack,
    BitFlip,
    LabelFlip,
    NonFinite,
    Scale,
    SignFlip,
    StaleGradient,
    VectorAttack,
    Zero,
)
from lightning_byzantine.callbacks import ByzantineMonitor, ByzantineSimulation
from lightning_byzantine.errors import WorkerLostError
from lightning_byzantine.matrix import WorkerMatrix
from lightning_byzantine.monitoring import Suspect

NUM_RANKS, FAULTY_STEP, MARGIN = 5, 20, 0.03
LOST = {"SIGKILL": signal.SIGKILL, "SIGSTOP": signal.SIGSTOP}


class NanOnce(NonFinite):
    """NaN in one step, the truth in all others."""

    def __init__(self) -> None:
        super().__init__()
        self.step = -1

    def tamper(self, matrix: WorkerMatrix, byzantine: Any) -> WorkerMatrix:
        self.step += 1
        return super().tamper(matrix, byzantine) if self.step == FAULTY_STEP else matrix


class Infinite(VectorAttack):
    """Infinity in every coordinate."""

    def forge(self, honest: Tensor, own: Tensor) -> Tensor:
        return torch.full_like(own, torch.inf)


ATTACKS: dict[str, type[Attack] | Any] = {
    "NaN once": NanOnce,
    "NaN always": NonFinite,
    "Inf": Infinite,
    "exponent bit flip, 1% of steps": lambda: BitFlip(bit=30, probability=0.01),
    "mantissa bit flip": lambda: BitFlip(bit=22),
    "zero gradient": Zero,
    "x10": lambda: Scale(10.0),
    "sign flip": SignFlip,
    "stale by 10 steps": lambda: StaleGradient(10),
    "labels flipped": lambda: LabelFlip(10),
}
FAULTS = ["clean", *ATTACKS, "poisoned BatchNorm buffers", "NaN in the metric", "exception", *LOST]
# Within how many steps a fault has to be named, if it persists.
HIDDEN = ("mantissa bit flip", "stale by 10 steps", "labels flipped")
WITHIN = {name: 500 if name in HIDDEN else 30 for name in FAULTS}
for passing in ("clean", "NaN once", "exponent bit flip, 1% of steps", *LOST):
    del WITHIN[passing]

# What a worker that computes rightly does not send.
PROVED = [name for name in ATTACKS if name in WITHIN and name != "labels flipped"]


@dataclass
class Run:
    strategy: str
    fault: str
    rank: int
    seed: int
    accuracy: float = float("nan")
    clean: float = float("nan")
    named_after: int | None = None
    proved_after: int | None = None
    audit: str | None = None
    others: tuple[int, ...] = ()
    others_proved: tuple[int, ...] = ()
    seconds: float = float("nan")

    def misses(self) -> list[str]:
        missed = [] if self.accuracy >= self.clean - MARGIN else [f"accuracy {self.accuracy:.3f}"]
        within = WITHIN.get(self.fault)
        if within is not None and (self.named_after is None or self.named_after > within):
            missed.append(f"not named within {within} steps")
        if self.fault in LOST and self.named_after is None:
            missed.append("not named by all survivors")
        if self.fault in PROVED and self.proved_after is None:
            missed.append("not proved")
        if self.others_proved:
            missed.append(f"honest ones proved to be faulty: {self.others_proved}")
        return [*missed, f"false alarm {self.others}"] if self.others else missed


class FaultyClassifier(DigitClassifier):
    """Has the faults that are in a worker's own process."""

    faulty: Run  # no argument: those are in the checkpoint

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        fault = self.faulty.fault if self.global_rank == self.faulty.rank else "clean"
        if fault == "exception":
            raise IndexError("a broken shard")
        if fault in LOST and self.global_step == FAULTY_STEP:
            os.kill(os.getpid(), LOST[fault])
        loss = super().training_step(batch, batch_idx)
        if self.faulty.fault == "NaN in the metric":
            self.log("odd", loss.detach() * (torch.nan if fault == "NaN in the metric" else 1), sync_dist=True)
        if fault == "poisoned BatchNorm buffers":
            for buffer in self.network.buffers():
                buffer.data.fill_(torch.nan if buffer.is_floating_point() else 1000)
        return loss

    def validation_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        accuracy = (self(batch[0]).argmax(1) == batch[1]).float().mean()
        if self.faulty.fault == "NaN in the metric" and self.global_rank == self.faulty.rank:
            accuracy *= torch.nan
        self.log("accuracy", accuracy, sync_dist=True)


class Watch(pl.Callback):
    """Keeps after which step each worker was first suspected, and proved to be faulty."""

    def __init__(self) -> None:
        self.monitor = ByzantineMonitor(on_suspect=self.note, every_n_steps=10**9)
        self.suspected: dict[int, int] = {}
        self.proved: dict[int, int] = {}
        self.step = 0

    def on_train_batch_start(self, trainer: pl.Trainer, *_: Any) -> None:
        self.step = trainer.global_step + 1

    def note(self, suspect: Suspect) -> None:
        self.suspected.setdefault(suspect.worker, self.step)
        if suspect.proof is not None:
            self.proved.setdefault(suspect.worker, self.step)


def train(run: Run, options: dict[str, Any], folder: Path, resume: bool = False, **arguments: Any) -> Run:
    """Train as one rank of all; return the run with its results."""
    be_quiet()
    pl.seed_everything(run.seed, verbose=False)
    entry, began = StrategyRegistry[run.strategy], time.monotonic()
    if options["ranks"] > 1 and run.fault != "NaN in the metric":  # which is logged by all ranks together
        arguments |= {"on_worker_error": "exclude"}
    watch = Watch()
    callbacks: list[pl.Callback] = [watch.monitor, watch]
    if run.fault in ATTACKS:
        callbacks.append(ByzantineSimulation(ATTACKS[run.fault](), [run.rank]))
    if run.fault in LOST:
        callbacks.append(ModelCheckpoint(folder, save_last=True, every_n_train_steps=10))
    trainer = pl.Trainer(
        strategy=entry["strategy"](**entry["init_params"], robust_metrics=True, **arguments),
        accelerator="cpu",
        devices=options["ranks"],
        max_steps=options["steps"],
        max_epochs=-1,
        limit_val_batches=0,
        default_root_dir=folder,
        callbacks=callbacks,
        logger=False,
        enable_checkpointing=run.fault in LOST,
        enable_progress_bar=False,
        enable_model_summary=False,
        use_distributed_sampler=False,
    )
    # What double momentum asks for, as in examples/configs.
    rates = {"lr": 0.1, "momentum": 0.0} if "double" in run.strategy else {}
    model = FaultyClassifier(**rates)
    model.faulty = Run(run.strategy, "clean", -1, run.seed) if resume else run
    data = DigitData(batch_size=options["batch_size"], partition=IID())
    trainer.fit(model, data, ckpt_path="last" if resume else None)
    trainer.limit_val_batches = 1.0
    data.val_dataloader = data.test_dataloader  # type: ignore[method-assign]
    run.accuracy = trainer.validate(model, data, verbose=False)[0]["accuracy"]
    run.named_after, run.proved_after = watch.suspected.pop(run.rank, None), watch.proved.pop(run.rank, None)
    run.audit = last_audit(folder / "suspects.jsonl", run.rank)
    run.others, run.others_proved = tuple(sorted(watch.suspected)), tuple(sorted(watch.proved))
    run.seconds = time.monotonic() - began
    return run


def last_audit(path: Path, worker: int) -> str | None:
    """Return the outcome of the worker's last audit; None if it had none."""
    lines = map(json.loads, path.read_text().splitlines() if path.exists() else [])
    verdicts = [line["verdict"] for line in lines if line["event"] == "audited" and line["worker"] == worker]
    return verdicts[-1] if verdicts else None


def train_until_lost(run: Run, options: dict[str, Any], folder: Path, rank: int, port: int) -> None:
    torch.set_num_threads(1)
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": str(NUM_RANKS)}
    os.environ |= {"NODE_RANK": "0", "LOCAL_RANK": str(rank)}
    try:
        train(run, options, folder, timeout=timedelta(seconds=20))
    except WorkerLostError as error:
        (folder / f"{rank}.json").write_text(json.dumps(error.ranks))


def lose(run: Run, options: dict[str, Any], folder: Path) -> None:
    """Have one process die or stop; note whether all others name it."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    # Each on its own, as a cluster would start them, so that no launcher ends the others.
    context = multiprocessing.get_context("fork")
    processes = [
        context.Process(target=train_until_lost, args=(run, options, folder, rank, port)) for rank in range(NUM_RANKS)
    ]
    for process in processes:
        process.start()
    deadline = time.monotonic() + 120
    for rank, process in enumerate(processes):
        if rank != run.rank:
            process.join(max(0, deadline - time.monotonic()))
    for process in processes:
        if process.is_alive():
            process.kill()
        process.join()
    said = [json.loads(path.read_text()) for path in folder.glob("*.json")]
    if said == [[run.rank]] * (NUM_RANKS - 1):
        run.named_after = 0


def one_run(pool: RankPool, run: Run, options: dict[str, Any]) -> Run:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        if run.fault in LOST:
            lose(run, options, folder)
        result = pool.run(train, run, options, folder, resume=run.fault in LOST)[(run.rank + 1) % options["ranks"]]
    if run.fault in LOST:
        result.named_after = run.named_after
    return result


def add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--faults", nargs="+", choices=FAULTS, default=FAULTS)
    parser.add_argument("--strategies", nargs="+", default=["byzantine_ddp"])
    parser.add_argument("--ranks", nargs="+", type=int, default=[0, 3], help="which one is faulty")
    parser.add_argument("--seeds", nargs="+", type=int, default=[1])
    parser.add_argument("--steps", type=int, default=500)
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--csv", type=Path)
    parser.add_argument("--clean-steps", type=int, help="only this: eight workers without a fault for so many steps")


def run(arguments: argparse.Namespace) -> None:
    if arguments.clean_steps:
        run_clean(arguments)
        return
    options = {"ranks": NUM_RANKS, "steps": arguments.steps, "batch_size": arguments.batch_size}
    runs: list[Run] = []
    single = Table({field.name: "{}" for field in fields(Run)}, arguments.csv)
    with ranks(NUM_RANKS) as pool:
        for strategy in arguments.strategies:
            clean: dict[int, float] = {}
            for each in runs_of(strategy, arguments):
                try:
                    done = one_run(pool, each, options)
                except AssertionError as error:
                    print(error, file=sys.stderr)
                    done = each  # its accuracy stays NaN
                done.clean = clean.setdefault(done.seed, done.accuracy)
                runs.append(done)
                single.add(*astuple(done))
    print_summary(runs)


def runs_of(strategy: str, arguments: argparse.Namespace) -> list[Run]:
    """Return what is to be run with one strategy, without a fault first."""
    clean = [Run(strategy, "clean", -1, seed) for seed in arguments.seeds]
    faulty = product((fault for fault in arguments.faults if fault != "clean"), arguments.ranks, arguments.seeds)
    return clean + [Run(strategy, fault, rank, seed) for fault, rank, seed in faulty]


def print_summary(runs: list[Run]) -> None:
    print()
    names = ["strategy", "fault", "accuracy", "against clean", "named after", "proved after", "audit"]
    names += ["others named", "others proved"]
    table = Table(dict.fromkeys(names, "{}"))
    for strategy, fault in dict.fromkeys((run.strategy, run.fault) for run in runs):
        same = [run for run in runs if (run.strategy, run.fault) == (strategy, fault)]
        columns = [
            [f"{run.accuracy:.3f}" for run in same],
            ["" if fault == "clean" else f"{100 * (run.accuracy - run.clean):+.1f}" for run in same],
            ["" if fault == "clean" else _named(run) for run in same],
            ["" if fault == "clean" else str(run.proved_after or "never") for run in same],
            [run.audit or "none" for run in same],
            [" ".join(map(str, run.others)) or "none" for run in same],
            [" ".join(map(str, run.others_proved)) or "none" for run in same],
        ]
        table.add(strategy, fault, *(", ".join(column) for column in columns))
    for run in runs:
        for missed in run.misses():
            print(f"\nMissed by {run.strategy}, {run.fault}, rank {run.rank}, seed {run.seed}: {missed}", end="")


def _named(run: Run) -> str:
    if run.named_after is None:
        return "never"
    return "by all" if run.fault in LOST else str(run.named_after)


def run_clean(arguments: argparse.Namespace) -> None:
    options = {"ranks": 1, "steps": arguments.clean_steps, "batch_size": arguments.batch_size}
    table = Table({"strategy": "{}", "seed": "{}", "suspected without a fault": "{}"}, arguments.csv)
    with ranks(1) as pool:
        for strategy, seed in product(arguments.strategies, arguments.seeds):
            with tempfile.TemporaryDirectory() as name:
                clean = Run(strategy, "clean", -1, seed)
                done = pool.run(train, clean, options, Path(name), workers_per_process=8)[0]
            table.add(strategy, seed, " ".join(map(str, done.others)) or "nobody")
