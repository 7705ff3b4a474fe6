"""Can liars have honest workers expelled, by crowding around one of them?

Each worker is a gloo process, and f = (m - 1) / 2 of m lie. They train the example's network on its digits under
``ByzantineMonitor(on_suspect="quarantine")``.

- ``rows``: the liars send what the honest worker of lowest index sends and a little of their own, for 150 steps, and
  then their gradients with the sign flipped
- ``data``: the liars compute rightly, on nearly the same images as one honest worker, so that their rows, their buffers
  and their metrics are all nearly its own; no audit can prove that
- ``none``: nobody lies

For each partition of the images: the accuracy, who was under suspicion by statistics in the end, who was proved to be
faulty, and who was expelled. Liars are the workers of highest index.
"""

import argparse
import tempfile
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
from lightning_byzantine.attacks import Framing, SignFlip
from lightning_byzantine.callbacks import ByzantineMonitor, ByzantineSimulation

PARTITIONS = {"IID": IID, "Dirichlet(0.3)": lambda: Dirichlet(0.3)}
KINDS = ["none", "rows", "data"]
OWN = 0.05  # the part of a liar's images that are its own


class Crowded(Partition):
    """Some workers have nearly the same images as one other."""

    def __init__(self, base: Partition, liars: list[int], victim: int = 0) -> None:
        self.base, self.liars, self.victim = base, liars, victim

    def split(self, labels: np.ndarray, num_workers: int, generator: np.random.Generator) -> np.ndarray:
        indices = self.base.split(labels, num_workers, generator)
        is_own = generator.random(indices[self.liars].shape) < OWN
        indices[self.liars] = np.where(is_own, indices[self.liars], indices[self.victim])
        return indices


class Classifier(DigitClassifier):
    """Logs its accuracy as a vote of all workers."""

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        loss = super().training_step(batch, batch_idx)
        self.log("voted_loss", loss.detach(), sync_dist=True)
        return loss

    def validation_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        self.log("accuracy", (self(batch[0]).argmax(1) == batch[1]).float().mean(), sync_dist=True)


def train(kind: str, partition: str, liars: list[int], steps: int, batch_size: int) -> tuple[float, list[list[int]]]:
    """Train as one worker; return the accuracy and who was suspected, proved and expelled."""
    be_quiet()
    torch.set_num_threads(1)
    pl.seed_everything(1, verbose=False)
    strategy, monitor = ByzantineDDPStrategy(robust_metrics=True), ByzantineMonitor(on_suspect="quarantine")
    attack = [ByzantineSimulation(Framing(SignFlip(), start=150, distance=0.05), liars)] if kind == "rows" else []
    images = PARTITIONS[partition]()
    with tempfile.TemporaryDirectory() as folder:
        trainer = pl.Trainer(
            strategy=strategy,
            accelerator="cpu",
            devices=torch.distributed.get_world_size(),
            max_steps=steps,
            max_epochs=-1,
            limit_val_batches=0,
            default_root_dir=folder,
            callbacks=[*attack, monitor],
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            use_distributed_sampler=False,
        )
        model = Classifier()
        data = DigitData(
            batch_size=batch_size, partition=Crowded(images, liars) if kind == "data" else images, validation=0
        )
        trainer.fit(model, data)
        trainer.limit_val_batches = 1.0
        data.val_dataloader = data.test_dataloader  # type: ignore[method-assign]
        accuracy = trainer.validate(model, data, verbose=False)[0]["accuracy"]
    return accuracy, [
        sorted(workers) for workers in (monitor.suspects, strategy.quarantined_by_proof, strategy.quarantined)
    ]


def add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--workers", nargs="+", type=int, default=[5, 9, 17])
    parser.add_argument("--partitions", nargs="+", choices=PARTITIONS, default=list(PARTITIONS))
    parser.add_argument("--kinds", nargs="+", choices=KINDS, default=KINDS)
    parser.add_argument("--steps", type=int, default=500)
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--csv", type=Path)


def run(arguments: argparse.Namespace) -> None:
    columns = {"workers": "{}", "liars": "{}", "images": "{}", "framing by": "{}", "accuracy": "{:.3f}"}
    table = Table(columns | dict.fromkeys(["suspected", "proved", "expelled"], "{}"), arguments.csv)
    for num_workers in arguments.workers:
        liars = list(range((num_workers + 1) // 2, num_workers))
        with ranks(num_workers) as pool:
            for partition, kind in product(arguments.partitions, arguments.kinds):
                results = pool.run(train, kind, partition, liars, arguments.steps, arguments.batch_size)
                accuracy, names = results[0]
                shown = [" ".join(map(str, workers)) or "nobody" for workers in names]
                table.add(num_workers, len(liars), partition, kind, accuracy, *shown)
