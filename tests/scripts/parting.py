"""Train with three ranks, one of which goes another way than the others, or ends; print what each rank says, and when.

Started as a user would start it, by Lightning (``python parting.py CASE``) or by torchrun. Each rank prints one line at
its fault and one at its end, as JSON.
"""

import argparse
import json
import os
import signal
import sys
import time
from datetime import timedelta
from pathlib import Path
from types import TracebackType
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

sys.path.insert(0, str(Path(__file__).parents[1]))

from training import Regression

from lightning_byzantine import ByzantineDDPStrategy

NUM_RANKS = 3
BATCHES = 6
FAULTY_BATCH = 3


def say(what: str, **details: Any) -> None:
    """Print one line, in one write, so that those of several processes do not mix."""
    line = json.dumps({"rank": int(os.environ.get("LOCAL_RANK", "0")), "what": what, "time": time.time(), **details})
    sys.stdout.write(f"\n@{line}\n")
    sys.stdout.flush()


def report(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
    """Say how this rank ends, instead of a traceback."""
    say("ends", error=kind.__name__, message=str(error))


class Model(Regression):
    """Takes the fault of a case upon itself where it is on the faulty rank, or on all for a case named so."""

    def __init__(self, case: str, faulty: int | None) -> None:
        super().__init__()
        self.case = case
        self.faulty = faulty
        if case == "everything frozen":
            self.requires_grad_(False)
        if case == "lazy parameters":
            self.network = nn.Sequential(nn.LazyLinear(16), nn.Tanh(), nn.Linear(16, 1))

    def is_at(self, *cases: str) -> bool:
        """Whether one of these faults happens here."""
        return self.case in cases and self.faulty in (None, int(os.environ.get("LOCAL_RANK", "0")))

    def setup(self, stage: str) -> None:
        if self.is_at("exception in setup"):
            say("fault")
            raise ValueError("no data on this machine")

    def configure_optimizers(self) -> torch.optim.Optimizer:
        if self.is_at("exception in configure_optimizers"):
            say("fault")
            raise ValueError("no such optimizer")
        return super().configure_optimizers()

    def train_dataloader(self) -> DataLoader:
        if self.case in ("everything frozen", "lazy parameters"):
            say("fault")
        return self._loader(BATCHES + self.is_at("one more batch") - self.is_at("one batch less"))

    def val_dataloader(self) -> DataLoader:
        return self._loader(BATCHES + self.is_at("one more batch to validate"))

    def _loader(self, num_batches: int) -> DataLoader:
        inputs = torch.randn(4 * num_batches, 8, generator=torch.Generator().manual_seed(self.global_rank))
        return DataLoader(TensorDataset(inputs, inputs.sum(1, keepdim=True)), batch_size=4)

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor | None:
        time.sleep(0.1)
        loss = nn.functional.mse_loss(self(batch[0]), batch[1])
        if self.case in ("one more batch", "one batch less") and batch_idx == BATCHES - 1:
            say("fault")
        if batch_idx != FAULTY_BATCH:
            return loss
        if self.is_at("exception in training_step"):
            say("fault")
            raise ValueError("this batch is broken")
        if self.is_at("SIGTERM"):
            say("fault", global_step=self.global_step)
            # As a scheduler would, from without: by the parent of a process of torchrun's as well.
            os.kill(os.getpid(), signal.SIGTERM)
        if self.is_at("a metric on one rank"):
            say("fault")
            self.log("odd", loss, sync_dist=True)
        if self.is_at("a loss without a graph"):
            say("fault")
            return loss.detach()
        if self.is_at("a loss of other parameters"):
            say("fault")
            return torch.ones(1, requires_grad=True).sum()
        if self.is_at("None"):
            say("fault")
            return None
        if self.is_at("exception in backward"):
            say("fault")
            return Failing.apply(loss)
        return loss

    def validation_step(self, batch: list[Tensor], batch_idx: int) -> None:
        if self.is_at("exception in validation_step"):
            say("fault")
            raise ValueError("this batch is broken")
        if self.case == "one more batch to validate" and batch_idx == BATCHES - 1:
            say("fault")
        self.log("val_loss", nn.functional.mse_loss(self(batch[0]), batch[1]), sync_dist=True, on_step=True)

    def on_train_end(self) -> None:
        say("trained", global_step=self.global_step)


class Failing(torch.autograd.Function):
    """Raises in backward."""

    @staticmethod
    def forward(ctx: Any, loss: Tensor) -> Tensor:
        return loss.clone()

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        raise RuntimeError("no gradient for this")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("case")
    parser.add_argument("--faulty", type=int, help="the rank; all ranks without it")
    parser.add_argument("--timeout", type=float, default=60)
    parser.add_argument("--folder", type=Path)
    parser.add_argument("--exclude", action="store_true")
    parser.add_argument("--exchange", default="all_gather")
    arguments = parser.parse_args()
    sys.excepthook = report
    pl.seed_everything(1, verbose=False)
    saves = arguments.folder is not None
    trainer = pl.Trainer(
        strategy=ByzantineDDPStrategy(
            timeout=timedelta(seconds=arguments.timeout),
            exchange=arguments.exchange,
            on_worker_error="exclude" if arguments.exclude else "raise",
        ),
        accelerator="cpu",
        devices=NUM_RANKS,
        max_epochs=2,
        num_sanity_val_steps=0,
        limit_val_batches=1.0 if "validat" in arguments.case else 0,
        logger=False,
        enable_checkpointing=saves,
        callbacks=[ModelCheckpoint(arguments.folder)] if saves else [],
        enable_progress_bar=False,
        enable_model_summary=False,
        use_distributed_sampler=False,
    )
    trainer.fit(Model(arguments.case, arguments.faulty))
    say("ends", error="", message="")


if __name__ == "__main__":
    main()
