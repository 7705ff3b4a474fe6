"""Trains one cell of the grid, with Lightning's Trainer and the strategy, and writes the result."""

import json
import os
import shutil
import sys
import time
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.loggers import TensorBoardLogger

from lightning_byzantine import ByzantineDDPStrategy
from lightning_byzantine.callbacks import ByzantineSimulation
from reproduction.classifier import Classifier
from reproduction.grid import Cell, Run, byzantine_workers, make_run

RESULT = "result.json"


def train_and_write(cell: Cell, folder: Path) -> None:
    """Train a cell in this process, which runs nothing else, and create ``folder`` atomically at the end.

    It holds the result, hyperparameters and accuracies for TensorBoard, and what was printed. Until then, they are in a
    folder beside it whose name begins with a dot; it remains if anything fails.
    """
    unfinished = unfinished_folder(folder)
    shutil.rmtree(unfinished, ignore_errors=True)
    unfinished.mkdir(parents=True)
    _print_to(unfinished / "log.txt")
    accuracies, seconds = train(cell.run)
    result = {**cell.labels, "accuracies": accuracies, "seconds": seconds, "run": cell.run}
    (unfinished / RESULT).write_text(json.dumps(result, indent=1))
    _write_for_tensorboard(cell, accuracies, unfinished)
    os.replace(unfinished, folder)


def unfinished_folder(folder: Path) -> Path:
    """Return the folder of an unfinished cell."""
    return folder.with_name(f".{folder.name}")


def train(config: dict[str, Any]) -> tuple[list[float], float]:
    """Train a cell, and return the accuracies after every epoch and the seconds that training took."""
    os.environ["OMP_NUM_THREADS"] = "1"  # otherwise Lightning gives all cores to this process
    torch.set_num_threads(1)
    pl.seed_everything(config["seed"], verbose=False)
    run = make_run(config)
    model, trainer = make_model(run), make_trainer(run)
    start = time.perf_counter()
    trainer.fit(model, datamodule=run.data)
    seconds = time.perf_counter() - start
    torch.distributed.destroy_process_group()
    return model.accuracies, seconds


def make_model(run: Run) -> Classifier:
    """Return the module of a cell, with the optimizer of its method."""
    method = run.method
    learning_rate = run.learning_rate * method.learning_rate_factor
    return Classifier(run.network, learning_rate, method.momentum, run.weight_decay, method.dampening, method.radius)


def make_trainer(run: Run) -> pl.Trainer:
    """Return the Trainer of a cell, with its strategy and attack."""
    strategy = ByzantineDDPStrategy(
        aggregator=run.rule,
        num_byzantine=run.setting.assumed,
        estimator=run.method.estimator,
        max_worker_grad_norm=run.max_worker_grad_norm,
        workers_per_process=run.setting.num_workers,
    )
    attacks = [] if run.attack is None else [ByzantineSimulation(run.attack, byzantine_workers(run.setting))]
    return pl.Trainer(
        strategy=strategy,
        accelerator=run.accelerator,
        devices=1,
        callbacks=attacks,
        max_epochs=run.epochs,
        logger=False,
        num_sanity_val_steps=0,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )


def _print_to(path: Path) -> None:
    # File descriptors, to include what libraries print.
    sys.stdout.flush()
    with path.open("w") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)


def _write_for_tensorboard(cell: Cell, accuracies: list[float], folder: Path) -> None:
    logger = TensorBoardLogger(folder, name="", version="")
    logger.log_hyperparams(cell.labels, {"final_accuracy": accuracies[-1]})
    for epoch, accuracy in enumerate(accuracies, start=1):
        logger.log_metrics({"test_accuracy": accuracy}, step=epoch)
    logger.finalize("success")
