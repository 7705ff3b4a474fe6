"""Real processes joined by gloo, kept over many tests, and forked from one that has imported what takes seconds."""

import multiprocessing
import os
import tempfile
import traceback
import warnings
from collections.abc import Callable
from datetime import timedelta
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, ClassVar

import torch
import torch.distributed as dist

TIMEOUT = 240.0

# Nothing of this repository: where it is imported from is for each process to find out.
PRELOADED = ["lightning.pytorch", "torch.distributed", "torch.testing", "torchmetrics", "torch._dynamo"]


def process_context() -> multiprocessing.context.ForkServerContext:
    """Return what starts processes that have imported Lightning already."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOADED)
    return context


class RankPool:
    """Runs module-level functions on every rank at once.

    Only the pool that was used last has processes: those of the others would take time from it, since gloo's threads
    do not rest.
    """

    _open: ClassVar["RankPool | None"] = None

    def __init__(self, num_ranks: int, backend: str = "gloo") -> None:
        self.num_ranks = num_ranks
        self._backend = backend
        self._folder = tempfile.TemporaryDirectory()
        self._processes: list[multiprocessing.process.BaseProcess] = []
        self._pipes: list[Connection] = []

    def run(self, function: Callable[..., Any], *args: Any, **kwargs: Any) -> list[Any]:
        """Return ``function(*args, **kwargs)`` of every rank; raise if one fails or takes too long."""
        if not self._processes:
            self._start()
        for pipe in self._pipes:
            pipe.send((function, args, kwargs))
        results, failures = [], []
        for rank, pipe in enumerate(self._pipes):
            if not pipe.poll(TIMEOUT):
                failures.append(f"rank {rank} did not answer within {TIMEOUT} s")
                continue
            succeeded, value = pipe.recv()
            (results if succeeded else failures).append(value)
        if failures:
            # What is left of a failed collective must not meet the next test.
            self.close()
            raise AssertionError("\n".join(failures))
        return results

    def close(self) -> None:
        """End all processes."""
        for pipe in self._pipes:
            pipe.close()
        for process in self._processes:
            process.join(10)
            if process.is_alive():
                process.kill()
        self._processes, self._pipes = [], []

    def _start(self) -> None:
        if RankPool._open is not None:
            RankPool._open.close()
        RankPool._open = self
        context = process_context()
        rendezvous = tempfile.mktemp(dir=self._folder.name)
        for rank in range(self.num_ranks):
            ours, theirs = context.Pipe()
            process = context.Process(
                target=_serve, args=(theirs, rank, self.num_ranks, rendezvous, self._backend), daemon=True
            )
            process.start()
            theirs.close()
            self._processes.append(process)
            self._pipes.append(ours)


def _serve(pipe: Connection, rank: int, num_ranks: int, rendezvous: str, backend: str) -> None:
    torch.set_num_threads(1)
    # What Lightning looks at to see that its processes were started already.
    os.environ |= {"LOCAL_RANK": str(rank), "NODE_RANK": "0", "WORLD_SIZE": str(num_ranks)}
    dist.init_process_group(
        backend,
        init_method=Path(rendezvous).as_uri(),
        rank=rank,
        world_size=num_ranks,
        timeout=timedelta(seconds=TIMEOUT / 2),
    )
    while True:
        try:
            function, args, kwargs = pipe.recv()
        except EOFError:
            break
        # Another seed on each rank: what must be the same on all of them is for the tested code to see to.
        torch.manual_seed(rank)
        try:
            with warnings.catch_warnings():
                pipe.send((True, function(*args, **kwargs)))
        except BaseException:
            pipe.send((False, f"rank {rank}:\n{traceback.format_exc()}"))
    dist.destroy_process_group()
