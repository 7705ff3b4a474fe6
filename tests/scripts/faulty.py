"""Train, and have one rank die, stop or hang in its third step; the others have to notice.

Under torchrun that restarts, the fault happens in the first incarnation only, and the run goes on from its last
checkpoint.
"""

import argparse
import json
import os
import signal
import socket
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
from sharded_models import Sharded, whole
from training import Regression

from lightning_byzantine import ByzantineDDPStrategy, ByzantineModelParallelStrategy

NUM_RANKS = {"ddp": 3, "fsdp": 6}


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--fault", choices=["none", "kill", "stop", "hang"], default="none")
    parser.add_argument("--rank", type=int, default=1)
    parser.add_argument("--strategy", choices=list(NUM_RANKS), default="ddp")
    parser.add_argument("--timeout", type=float, default=60)
    parser.add_argument("--folder", type=Path, required=True)
    parser.add_argument("--fork", nargs="*", metavar="FAULT:RANK", help="start all ranks for each of these, at once")
    arguments = parser.parse_args()
    if arguments.fork:
        fork_all(arguments)
    else:
        train(arguments)


def fork_all(arguments: argparse.Namespace) -> None:
    """Start every rank of every case on its own, as a cluster would, so that no launcher ends the others."""
    processes: dict[int, tuple[str, int]] = {}
    for case in arguments.fork:
        fault, rank_of_fault = case.split(":")
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        for rank in range(NUM_RANKS[arguments.strategy]):
            process = os.fork()
            if process == 0:
                os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
                os.environ["WORLD_SIZE"] = str(NUM_RANKS[arguments.strategy])
                os.environ |= {"NODE_RANK": "0", "LOCAL_RANK": str(rank)}
                log = os.open(arguments.folder / f"{case}.{rank}.log", os.O_WRONLY | os.O_CREAT)
                os.dup2(log, 1)
                os.dup2(log, 2)
                arguments.fault, arguments.rank, arguments.folder = fault, int(rank_of_fault), arguments.folder / case
                train(arguments)
                return
            processes[process] = (case, rank)
    by_name = {name: process for process, name in processes.items()}
    codes: dict[str, dict[int, int]] = {case: {} for case in arguments.fork}
    while processes:
        process, status = os.wait()
        case, rank = processes.pop(process)
        codes[case][rank] = os.waitstatus_to_exitcode(status)
        faulty = by_name[(case, int(case.split(":")[1]))]
        if len(codes[case]) == NUM_RANKS[arguments.strategy] - 1 and faulty in processes:  # stopped, or hangs
            os.kill(faulty, signal.SIGKILL)
    print(json.dumps(codes))


def train(arguments: argparse.Namespace) -> None:
    pl.seed_everything(1)
    timeout = timedelta(seconds=arguments.timeout)
    is_ddp = arguments.strategy == "ddp"
    strategy: Any = ByzantineModelParallelStrategy(3, 2, timeout=timeout)
    if is_ddp:
        strategy = ByzantineDDPStrategy(timeout=timeout)
    trainer = pl.Trainer(
        strategy=strategy,
        accelerator="cpu",
        devices=NUM_RANKS[arguments.strategy],
        max_steps=10,
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=[ModelCheckpoint(arguments.folder, save_last=True, every_n_train_steps=2)],
    )
    first = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") == "0"
    model = (Faulty if is_ddp else FaultyPart)(arguments.fault if first else "none", arguments.rank)
    trainer.fit(model, data(), ckpt_path="last")
    torch.distributed.destroy_process_group()


class HasFault(pl.LightningModule):
    """One rank of it has a fault."""

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

    def training_step(self, batch: list[torch.Tensor], batch_idx: int) -> torch.Tensor:
        # Lightning resumes in mid-epoch, but plain loaders start over.
        generator = torch.Generator().manual_seed(100 * self.global_step + self.global_rank)
        inputs = torch.randn(4, 8, generator=generator)
        return super().training_step([inputs, inputs.sum(1, keepdim=True)], batch_idx)

    def on_train_end(self) -> None:
        self.say(f"ends with {whole(self).sum().item()!r}")

    def say(self, what: str) -> None:
        # One write, so that lines of several processes do not mix.
        sys.stdout.write(f"rank {self.global_rank} {what}\n")
        sys.stdout.flush()


class Faulty(HasFault, Regression):
    pass


class FaultyPart(HasFault, Sharded):
    pass


if __name__ == "__main__":
    main()
