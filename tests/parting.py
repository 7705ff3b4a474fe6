"""A model for three ranks, one of which goes another way than the others; what each rank then says, and when."""

import json
import os
import signal
import tempfile
import time
from datetime import timedelta
from pathlib import Path
from typing import Any, NamedTuple

import lightning.pytorch as pl
import processes
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset
from torchmetrics import MeanMetric
from training import Regression

from lightning_byzantine import ByzantineDDPStrategy

NUM_RANKS = 3
NUM_BATCHES = 6
BATCH_OF_FAULT = 3
SCRIPT = Path(__file__).parent / "scripts" / "part.py"


class Case(NamedTuple):
    """A fault, the rank that has it, and what all ranks must say.

    Args:
        fault: its name, which the model knows.
        rank: the faulty rank; None if all have the fault.
        own: what the faulty rank says.
        others: what the others say, "" for nothing, since they end well.

    """

    fault: str
    rank: int | None
    own: str
    others: str = ""


_PARTED = "Ranks are in different collectives: rank {} in "
CASES = [
    Case("one more batch", 2, _PARTED.format(2) + "the start of the next batch (train, epoch 0, batch 5); ranks 0, 1"),
    Case("one batch less", 0, "ranks 1, 2 in the start of the next batch (train, epoch 0, batch 4)"),
    Case("one more batch to validate", 0, _PARTED.format(0) + "a reduction of 1 float32 (validate); ranks 1, 2 in "),
    Case("a metric on one rank", 1, _PARTED.format(1) + "a reduction of 1 float32 (train, epoch 0, batch 3); ranks"),
    Case("a loss without a graph", 2, "element 0 of tensors does not require grad", "Lost rank 2: it has failed with "),
    Case(
        "a loss of other parameters",
        1,
        "The backward pass has not reached all",
        "Lost rank 1: it has failed with ",
    ),
    Case("None", 1, "Skipping the `training_step` by returning None", "Lost rank 1: it has failed with RuntimeError"),
    Case("exception in training_step", 0, "this batch is broken", "Lost rank 0: it has failed with ValueError: this "),
    Case("exception in validation_step", 1, "this batch is broken", "Lost rank 1: it has failed with ValueError: th"),
    Case(
        "exception beside a torchmetrics metric", 1, "this batch is broken", "Lost rank 1: it has failed with ValueErr"
    ),
    Case("a checkpoint on one rank", 1, _PARTED.format(1) + "the gathering of states for a checkpoint (train, epoch 0"),
    Case("exception in backward", None, "no gradient for this"),
    Case("exception in setup", 1, "no data on this machine", "Lost rank 1: it has failed with ValueError: no data"),
    Case("exception in setup", None, "no data on this machine"),
    Case("exception in configure_optimizers", 2, "no such optimizer", "Lost rank 2: it has failed with ValueError"),
    Case("everything frozen", None, "DistributedDataParallel is not needed when a module doesn't have any parameter"),
    Case("lazy parameters", None, "Modules with uninitialized parameters can't be used with `DistributedDataPar"),
    Case("SIGTERM", 1, "", ""),
    Case("SIGTERM", None, "", ""),
    Case("SIGTERM in validation", 1, "", ""),
]


class Outcome(NamedTuple):
    """How a rank has ended: the error, "" without one, its message and notes, and how many seconds after the fault."""

    error: str
    message: str
    seconds: float


class Parting(Regression):
    """Has a fault on one rank, or on all."""

    def __init__(self, fault: str, rank: int | None) -> None:
        super().__init__()
        self.fault = fault
        self.rank = rank
        self.fault_at: float | None = None
        self.metric = MeanMetric()
        if fault == "everything frozen":
            self.requires_grad_(False)
        if fault == "lazy parameters":
            self.network = nn.Sequential(nn.LazyLinear(16), nn.Tanh(), nn.Linear(16, 1))

    def has(self, *faults: str) -> bool:
        """Return whether one of these faults is to happen here, and note the time."""
        is_here = self.fault in faults and self.rank in (None, self.global_rank)
        if self.fault in faults:
            self.fault_at = time.time()
        return is_here

    def setup(self, stage: str) -> None:
        if self.has("exception in setup"):
            raise ValueError("no data on this machine")
        self.has("everything frozen", "lazy parameters")

    def configure_optimizers(self) -> torch.optim.Optimizer:
        if self.has("exception in configure_optimizers"):
            raise ValueError("no such optimizer")
        return super().configure_optimizers()

    def train_dataloader(self) -> DataLoader:
        return self._loader(NUM_BATCHES + self.has("one more batch") - self.has("one batch less"))

    def val_dataloader(self) -> DataLoader:
        return self._loader(NUM_BATCHES + self.has("one more batch to validate"))

    def _loader(self, num_batches: int) -> DataLoader:
        inputs = torch.randn(4 * num_batches, 8, generator=torch.Generator().manual_seed(self.global_rank))
        return DataLoader(TensorDataset(inputs, inputs.sum(1, keepdim=True)), batch_size=4)

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor | None:
        loss = nn.functional.mse_loss(self(batch[0]), batch[1])
        if batch_idx == NUM_BATCHES - 1:
            self.has("one more batch", "one batch less")
        return loss if batch_idx != BATCH_OF_FAULT else self._after_fault(loss)

    def _after_fault(self, loss: Tensor) -> Tensor | None:
        if self.has("exception in training_step"):
            raise ValueError("this batch is broken")
        if self.has("SIGTERM"):
            os.kill(os.getpid(), signal.SIGTERM)
        if self.has("a checkpoint on one rank"):
            self.trainer.save_checkpoint(Path(tempfile.mkdtemp()) / "alone.ckpt")
        if self.has("a metric on one rank"):
            self.log("odd", loss, sync_dist=True)
        if self.has("a loss without a graph"):
            return loss.detach()
        if self.has("a loss of other parameters"):
            return torch.ones(1, requires_grad=True).sum()
        if self.has("None"):
            return None
        if self.has("exception in backward"):
            return _NoGradient.apply(loss)
        return loss

    def validation_step(self, batch: list[Tensor], batch_idx: int) -> None:
        if self.has("exception in validation_step", "exception beside a torchmetrics metric"):
            raise ValueError("this batch is broken")
        if self.fault == "exception beside a torchmetrics metric":
            self.metric.update(batch[0])
            self.log("metric", self.metric)
            return
        if batch_idx == 1 and self.has("SIGTERM in validation"):
            os.kill(os.getpid(), signal.SIGTERM)
        if batch_idx == NUM_BATCHES - 1:
            self.has("one more batch to validate")
        loss = nn.functional.mse_loss(self(batch[0]), batch[1])
        self.log("val_loss", loss, sync_dist=True, on_step=True, on_epoch=True)


class _NoGradient(torch.autograd.Function):
    """Raises in backward."""

    @staticmethod
    def forward(ctx: Any, loss: Tensor) -> Tensor:
        return loss.clone()

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        raise RuntimeError("no gradient for this")


def train(fault: str, rank: int | None, folder: Path | None = None, timeout: float = 60, **arguments: Any) -> Outcome:
    """Train on this rank until the end, or until an error."""
    pl.seed_everything(1, verbose=False)
    model = Parting(fault, rank)
    trainer = pl.Trainer(
        strategy=ByzantineDDPStrategy(timeout=timedelta(seconds=timeout), **arguments),
        accelerator="cpu",
        devices=NUM_RANKS,
        max_epochs=2,
        num_sanity_val_steps=0,
        limit_val_batches=1.0 if "validat" in fault or "torchmetrics" in fault else 0,
        logger=False,
        enable_checkpointing=folder is not None,
        callbacks=[ModelCheckpoint(folder)] if folder is not None else [],
        enable_progress_bar=False,
        enable_model_summary=False,
        use_distributed_sampler=False,
    )
    error: BaseException | None = None
    try:
        trainer.fit(model)
    except BaseException as raised:
        error = raised
    now = time.time()
    if error is None:
        return Outcome("", "", 0.0)
    message = "\n".join([str(error), *getattr(error, "__notes__", [])])
    return Outcome(type(error).__name__, message, now - (model.fault_at or now))


def outcomes_of_processes(case: Case, launcher: str, folder: Path | None = None) -> list[Outcome]:
    """Start the script as a user would, and return how each rank has ended."""
    command = []
    if launcher == "torchrun":
        command += ["-m", "torch.distributed.run", f"--nproc-per-node={NUM_RANKS}", "--rdzv-backend=c10d"]
        command += ["--rdzv-endpoint=127.0.0.1:0"]
    command += [str(SCRIPT), case.fault]
    command += [] if case.rank is None else [f"--rank={case.rank}"]
    command += [] if folder is None else [f"--folder={folder}"]
    _, output = processes.run(*command)
    lines = [json.loads(line[1:]) for line in output.splitlines() if line.startswith("@")]
    ends = {line["rank"]: Outcome(*line["outcome"]) for line in lines}
    if sorted(ends) != list(range(NUM_RANKS)):
        raise AssertionError(f"not all ranks have said how they end:\n{output}")
    return [ends[rank] for rank in range(NUM_RANKS)]
