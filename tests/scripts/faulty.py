"""Train, and have one rank die, stop or hang in its third step; print what became of the others, and how long it took.

Under torchrun that restarts, the fault happens in the first incarnation only, and the run goes on from its last
checkpoint.
"""

import argparse
import os
import signal
import sys
import time
from datetime import timedelta
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import ModelCheckpoint

sys.path.insert(0, str(Path(__file__).parents[1]))

from fit import data
from training import Regression, parameters

from lightning_byzantine import ByzantineDDPStrategy


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--fault", choices=["none", "kill", "stop", "hang"], default="none")
    parser.add_argument("--rank", type=int, default=1)
    parser.add_argument("--devices", type=int, default=3)
    parser.add_argument("--timeout", type=float, default=60)
    parser.add_argument("--folder", type=Path, required=True)
    arguments = parser.parse_args()

    pl.seed_everything(1)
    trainer = pl.Trainer(
        strategy=ByzantineDDPStrategy(timeout=timedelta(seconds=arguments.timeout)),
        accelerator="cpu",
        devices=arguments.devices,
        max_epochs=2,
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=[ModelCheckpoint(arguments.folder, save_last=True, every_n_train_steps=2)],
    )
    first = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") == "0"
    model = Faulty(arguments.fault if first else "none", arguments.rank)
    trainer.fit(model, data(), ckpt_path="last")
    torch.distributed.destroy_process_group()


class Faulty(Regression):
    def __init__(self, fault: str, rank: int) -> None:
        super().__init__()
        self.fault, self.rank = fault, rank

    def on_train_start(self) -> None:
        self.say(f"starts at step {self.global_step}")

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        if self.global_rank != self.rank or self.global_step != 3 or self.fault == "none":
            return
        self.say(f"has its fault, process {os.getpid()}")
        if self.fault == "hang":
            time.sleep(600)
        os.kill(os.getpid(), {"kill": signal.SIGKILL, "stop": signal.SIGSTOP}[self.fault])

    def on_train_end(self) -> None:
        self.say(f"ends with {parameters(self).sum().item()!r}")

    def say(self, what: str) -> None:
        # One write, so that lines of several processes do not mix.
        sys.stdout.write(f"rank {self.global_rank} {what}\n")
        sys.stdout.flush()


if __name__ == "__main__":
    main()
