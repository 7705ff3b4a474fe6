"""Whether training ends with the same parameters, to the bit, before and after a change of the code.

Three gloo processes train a small network on scikit-learn's digits for 20 steps, in each of the configurations below::

    PYTHONPATH=path/to/the/code/before python tests/same_bits.py --write before.pt
    python tests/same_bits.py --compare before.pt

The exit status is 1 if any parameter or buffer of any process differs. Only public names are used, so that one script
runs on both. GeometricMedian's last digits, for one, depend on the machine: compare on the one that wrote the file.
"""

import argparse
import logging
import sys
import tempfile
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from rank_pool import RankPool
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import lightning_byzantine
from lightning_byzantine import ByzantineDDPStrategy
from lightning_byzantine.aggregators import (
    ARC,
    CTMA,
    NNM,
    Bucketing,
    CenteredClipping,
    CoordinateWiseMedian,
    CoordinateWiseTrimmedMean,
    GeometricMedian,
    Krum,
    Mean,
    MultiKrum,
)
from lightning_byzantine.attacks import ALittleIsEnough, Intermittent, NonFinite, SignFlip
from lightning_byzantine.callbacks import ByzantineMonitor, ByzantineSimulation
from lightning_byzantine.estimators import WorkerMomentum
from lightning_byzantine.optim import DoubleMomentumEstimator

NUM_RANKS, NUM_STEPS, BATCH_SIZE = 3, 20, 8

States = list[dict[str, Tensor]]  # parameters and buffers by name, of each rank


@dataclass
class Configuration:
    """What is trained, made anew for every run, since strategies and callbacks keep state."""

    strategy: Callable[[], ByzantineDDPStrategy]
    callbacks: Callable[[], list[pl.Callback]] = list
    resumed: bool = False  # from a checkpoint after half of the steps
    nan_steps: range = range(0)  # in which the last rank's loss is NaN


CONFIGURATIONS: dict[str, Configuration] = {
    "defaults": Configuration(ByzantineDDPStrategy),
    "sharded, CTMA(CoordinateWiseMedian), momentum sent as it is": Configuration(
        lambda: ByzantineDDPStrategy(
            CTMA(CoordinateWiseMedian()), estimator=WorkerMomentum(transparent=False), exchange="all_to_all"
        )
    ),
    "Krum, raw gradients clipped, many buckets": Configuration(
        lambda: ByzantineDDPStrategy(Krum(), estimator=None, max_worker_grad_norm=0.5, bucket_cap_mb=0.005)
    ),
    "CenteredClipping, resumed": Configuration(
        lambda: ByzantineDDPStrategy(CenteredClipping(tau=0.5, num_iterations=2)), resumed=True
    ),
    "sharded, CTMA(NNM(GeometricMedian)), resumed": Configuration(
        lambda: ByzantineDDPStrategy(exchange="all_to_all", bucket_cap_mb=0.005), resumed=True
    ),
    "double momentum, GeometricMedian": Configuration(
        lambda: ByzantineDDPStrategy(
            GeometricMedian(), estimator=DoubleMomentumEstimator(min_beta=0.05, min_gamma=0.05, weighted=False)
        )
    ),
    "sharded, double momentum clipped, resumed": Configuration(
        lambda: ByzantineDDPStrategy(
            NNM(CoordinateWiseMedian()),
            estimator=DoubleMomentumEstimator(beta=0.1, gamma=0.1),
            max_worker_grad_norm=1.0,
            exchange="all_to_all",
        ),
        resumed=True,
    ),
    "three workers in each process, Bucketing": Configuration(
        lambda: ByzantineDDPStrategy(
            Bucketing(CoordinateWiseTrimmedMean(), bucket_size=2), num_byzantine=1, workers_per_process=3
        )
    ),
    "three workers in each process, sharded, clipped, attacked": Configuration(
        lambda: ByzantineDDPStrategy(workers_per_process=3, max_worker_grad_norm=1.0, exchange="all_to_all"),
        lambda: [ByzantineSimulation(ALittleIsEnough(), workers=[1, 4, 6])],
    ),
    "shadow": Configuration(lambda: ByzantineDDPStrategy(shadow=True), lambda: [ByzantineMonitor()]),
    "Mean": Configuration(lambda: ByzantineDDPStrategy(Mean())),
    "a rank that sends NaN, ARC(MultiKrum)": Configuration(
        lambda: ByzantineDDPStrategy(ARC(MultiKrum())), nan_steps=range(5, 9)
    ),
    "sharded, a rank that sends NaN, steps skipped": Configuration(
        lambda: ByzantineDDPStrategy(num_byzantine=0, on_breakdown="skip", exchange="all_to_all"),
        nan_steps=range(5, 9),
    ),
    "attacked, the attacker in quarantine": Configuration(
        lambda: ByzantineDDPStrategy(GeometricMedian()),
        lambda: [
            ByzantineSimulation(SignFlip(), workers=[1]),
            ByzantineMonitor(on_suspect="quarantine", punish_without_proof=True),
        ],
    ),
    "an attacker that sends NaN now and then": Configuration(
        lambda: ByzantineDDPStrategy(CoordinateWiseMedian()),
        lambda: [ByzantineSimulation(Intermittent(NonFinite(), probability=0.3), workers=[0])],
    ),
    "three workers in each process, an honest one in quarantine": Configuration(
        lambda: ByzantineDDPStrategy(CoordinateWiseMedian(), workers_per_process=3),
        lambda: [ByzantineSimulation(ALittleIsEnough(), workers=[4]), Quarantining(0)],
    ),
}


class Quarantining(pl.Callback):
    """Puts a worker in quarantine in the middle of the run."""

    def __init__(self, worker: int) -> None:
        self.worker = worker

    def on_train_batch_end(self, trainer: pl.Trainer, *_: Any) -> None:
        if trainer.global_step == NUM_STEPS // 2 and self.worker not in trainer.strategy.quarantined:
            trainer.strategy.quarantine([self.worker])


class Classifier(pl.LightningModule):
    """A convolution with batch normalisation and a linear layer."""

    def __init__(self, nan_steps: range) -> None:
        super().__init__()
        self.nan_steps = nan_steps
        self.network = nn.Sequential(
            nn.Conv2d(1, 8, kernel_size=3), nn.BatchNorm2d(8), nn.ReLU(), nn.Flatten(), nn.Linear(8 * 6 * 6, 10)
        )

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        images, labels = batch
        loss = nn.functional.cross_entropy(self.network(images), labels)
        is_faulty = self.global_rank == NUM_RANKS - 1 and batch_idx in self.nan_steps
        return loss * torch.nan if is_faulty else loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.05, momentum=0.9)


def train(name: str, folder: Path) -> dict[str, Tensor]:
    """Train as one rank of all; return its parameters and buffers."""
    warnings.simplefilter("ignore")
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    configuration = CONFIGURATIONS[name]
    if not configuration.resumed:
        return fit(configuration, folder, max_epochs=2)[1].state_dict()
    checkpoint = folder / "middle.ckpt"
    trainer, _ = fit(configuration, folder, max_epochs=1)
    trainer.save_checkpoint(checkpoint)
    return fit(configuration, folder, max_epochs=2, ckpt_path=checkpoint)[1].state_dict()


def fit(
    configuration: Configuration, folder: Path, max_epochs: int, ckpt_path: Path | None = None
) -> tuple[pl.Trainer, pl.LightningModule]:
    """Train in epochs of half of the steps each."""
    pl.seed_everything(1, verbose=False)
    images, labels = load_digits(return_X_y=True)
    data = TensorDataset(torch.tensor(images).float().view(-1, 1, 8, 8) / 16, torch.tensor(labels))
    strategy, model = configuration.strategy(), Classifier(configuration.nan_steps)
    trainer = pl.Trainer(
        strategy=strategy,
        accelerator="cpu",
        devices=NUM_RANKS,
        max_epochs=max_epochs,
        limit_train_batches=NUM_STEPS // 2 * strategy.workers_per_process,
        default_root_dir=folder,
        callbacks=configuration.callbacks(),
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(model, DataLoader(data, BATCH_SIZE), ckpt_path=ckpt_path)
    return trainer, model


def largest_difference(before: States, after: States) -> float:
    """Return 0 for the same bits, and otherwise the largest difference of two values, or NaN where that is none."""
    differences = [0.0]
    for old, new in zip(before, after, strict=True):
        if old.keys() != new.keys():
            raise ValueError(f"parameters and buffers have other names now: {sorted(old)}, {sorted(new)}")
        for value, other in ((old[name].flatten(), new[name].flatten()) for name in old):
            if not torch.equal(value.view(torch.uint8), other.view(torch.uint8)):
                differences.append(float((value.double() - other.double()).abs().max()) or torch.nan)
    return float(torch.tensor(differences).max())


def main() -> int:
    """Write or compare; return how many configurations differ."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    task = parser.add_mutually_exclusive_group(required=True)
    task.add_argument("--write", type=Path, metavar="FILE")
    task.add_argument("--compare", type=Path, metavar="FILE")
    parser.add_argument("--only", nargs="+", choices=CONFIGURATIONS, default=list(CONFIGURATIONS), metavar="NAME")
    arguments = parser.parse_args()
    print(f"The code in {Path(lightning_byzantine.__file__).parent}")
    pool, states = RankPool(NUM_RANKS), {}
    before = None if arguments.compare is None else torch.load(arguments.compare, weights_only=True)
    num_different = 0
    for name in arguments.only:
        with tempfile.TemporaryDirectory() as folder:
            states[name] = pool.run(train, name, Path(folder))
        if before is None:
            print(f"{name}: written", flush=True)
            continue
        difference = largest_difference(before[name], states[name])
        num_different += difference != 0
        print(f"{name}: {'same to the bit' if difference == 0 else f'differs by up to {difference:g}'}", flush=True)
    pool.close()
    if arguments.write is not None:
        torch.save(states, arguments.write)
    return num_different


if __name__ == "__main__":
    sys.exit(1 if main() else 0)
