"""Processes that share the one GPU, joined by gloo, and the exchanges' collectives over NCCL."""

import multiprocessing
import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from itertools import product
from typing import Any, NamedTuple
from unittest import mock

import lightning.pytorch as pl
import rank_pool
import torch
import torch.distributed as dist
from harness import Table, be_quiet, ranks
from on_cuda import Section, synchronize
from reproduction.networks import DigitNetwork
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_byzantine import ByzantineDDPStrategy
from lightning_byzantine.aggregators import CTMA, NNM, Aggregator, CoordinateWiseMedian, GeometricMedian, Mean
from lightning_byzantine.attacks import SignFlip
from lightning_byzantine.callbacks import ByzantineMonitor, ByzantineSimulation
from lightning_byzantine.exchange import EXCHANGES, SingleRank
from lightning_byzantine.optim import DoubleMomentumEstimator

STEPS = 12
CONFIGURATIONS: dict[str, dict[str, Any]] = {
    "default": {},
    "median": {"aggregator": CTMA(NNM(CoordinateWiseMedian()))},
    "double momentum": {"estimator": DoubleMomentumEstimator(min_beta=0.05, min_gamma=0.05, weighted=False)},
    "clipped, checked": {"max_worker_grad_norm": 1.0, "check_consistency_every_n_steps": 3, "robust_metrics": True},
    "two workers each": {"workers_per_process": 2},
}


class Transfer(NamedTuple):
    operation: Callable[[Tensor, int], Any]
    tensor: Tensor
    rank: int


class Arriving:
    """What a transfer of a GPU tensor by way of the host's memory returns."""

    def __init__(self, tensor: Tensor, rank: int, group: dist.ProcessGroup) -> None:
        self._tensor, self._on_host = tensor, torch.empty_like(tensor, device="cpu")
        self._work = dist.distributed_c10d.irecv(self._on_host, rank, group=group)

    def wait(self) -> None:
        assert self._work is not None
        self._work.wait()
        self._tensor.copy_(self._on_host)


@contextmanager
def transfers() -> Iterator[None]:
    """Let a backend that takes GPU tensors only send them from one rank to another, which gloo can't by itself."""
    if dist.get_backend() == "gloo":
        yield
        return
    group, send = dist.new_group(backend="gloo"), dist.isend

    def receive(tensor: Tensor, rank: int) -> Arriving:
        return Arriving(tensor, rank, group)

    with (
        mock.patch("torch.distributed.isend", lambda tensor, rank: send(tensor.cpu(), rank, group=group)),
        mock.patch("torch.distributed.irecv", receive),
        mock.patch("torch.distributed.recv", lambda tensor, rank: receive(tensor, rank).wait()),
        mock.patch("torch.distributed.P2POp", Transfer),
        mock.patch("torch.distributed.batch_isend_irecv", lambda all: [each.operation(*each[1:]) for each in all]),
    ):
        yield


class Classifier(pl.LightningModule):
    """Batch normalised, and without kernels whose sums differ between runs."""

    def __init__(self) -> None:
        super().__init__()
        self.network = DigitNetwork()

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        loss = nn.functional.cross_entropy(self.network(batch[0]), batch[1])
        self.log("loss", loss, sync_dist=True)
        return loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.003)


def run(section: Section) -> None:
    columns = {"processes": "{}", "backend": "{}", "exchange": "`{}`", "training": "{}", "same on all ranks": "{}"}
    table = section.table(columns | {"against the CPU": "{:.1e}", "ms a step": "{:.1f}"})
    comparison = Comparison(section, table)
    # Not forked, because CUDA does not survive that.
    spawn = multiprocessing.get_context("spawn")
    # Like NCCL, which needs a GPU for every process, the second backend takes no tensors that are on the CPU.
    backends = ["gloo", f"{section.device.type}:gloo"]
    for num_processes, backend in product((2,) if section.small else (2, 4), backends):
        with mock.patch.object(rank_pool, "process_context", lambda: spawn), ranks(num_processes, backend) as pool:
            rank_pool.TIMEOUT = 90.0  # sooner than `ranks` would give up
            for exchange, name in product(EXCHANGES, CONFIGURATIONS):
                if len(section.failures) > 3:
                    return  # each may have taken the whole time
                with section.attempt(f"{name} in {num_processes} processes by {exchange} over {backend}"):
                    comparison.add(pool, backend, exchange, name)
            with section.attempt(f"a failing rank of {num_processes} over {backend}"):
                check_failure(section, pool)
    with section.attempt("collectives of one process"):
        collectives(section)


class Comparison:
    """Training on the device, compared with the CPU."""

    def __init__(self, section: Section, table: Table) -> None:
        self._section, self._table = section, table
        self._on_cpu: dict[tuple[int, str, str], Tensor] = {}

    def add(self, pool: rank_pool.RankPool, backend: str, exchange: str, name: str) -> None:
        what, arguments = f"{name} in {pool.num_ranks} processes by {exchange} over {backend}", CONFIGURATIONS[name]
        key = (pool.num_ranks, exchange, name)
        if key not in self._on_cpu:
            self._on_cpu[key] = pool.run(train, "cpu", exchange, arguments)[0][0]
        results = pool.run(train, self._section.device.type, exchange, arguments)
        on_device, seconds = results[0]
        same = all(torch.equal(on_device, other) for other, _ in results)
        error = float((on_device - self._on_cpu[key]).norm() / on_device.norm())
        good = self._section.expect(same, f"{what}: parameters differ between ranks")
        self._section.expect(error < 1e-4, f"{what}: parameters differ from the CPU's by {error}")
        self._table.add(pool.num_ranks, backend, exchange, name, good, error, 1e3 * seconds)


def check_failure(section: Section, pool: rank_pool.RankPool) -> None:
    """See that an error of one rank ends the others, which name the rank."""
    reports = pool.run(fail, section.device.type)
    print("\na rank fails:", *reports, "", sep="\n", flush=True)
    lost = [report for report in reports[1:] if report.startswith("WorkerLostError: Lost rank 0")]
    section.expect(reports[0].startswith("KeyError") and len(lost) == len(reports) - 1, f"errors are {reports}")


def train(
    device: str, exchange: str, arguments: dict[str, Any], model: Classifier | None = None
) -> tuple[Tensor, float]:
    """Train in this process of several; return its parameters and buffers, and the seconds a step."""
    torch.manual_seed(1)
    model = Classifier() if model is None else model
    strategy = ByzantineDDPStrategy(exchange=exchange, process_group_backend="gloo", **arguments)
    callbacks: list[pl.Callback] = [ByzantineMonitor()]
    if dist.get_world_size() > 2:
        callbacks.append(ByzantineSimulation(SignFlip(), workers=[0]))
    trainer = make_trainer(device, strategy, callbacks, STEPS)
    data = loader()
    start = time.perf_counter()
    with transfers():
        trainer.fit(model, data)
    synchronize(torch.device(device))
    seconds = (time.perf_counter() - start) / STEPS
    values = [value.detach().double().cpu().flatten() for value in model.state_dict().values()]
    return torch.cat(values), seconds


def make_trainer(
    device: str, strategy: ByzantineDDPStrategy, callbacks: list[pl.Callback], num_steps: int, precision: Any = 32
) -> pl.Trainer:
    """Return a Trainer for this process of several that share the GPU."""
    be_quiet()
    torch.backends.cudnn.allow_tf32, torch.backends.cudnn.deterministic = False, True
    # To Lightning, every process is the only one of its machine, for all to use the first GPU.
    os.environ |= {"NODE_RANK": str(dist.get_rank()), "LOCAL_RANK": "0", "CUBLAS_WORKSPACE_CONFIG": ":4096:8"}
    return pl.Trainer(
        accelerator=device,
        devices=1,
        num_nodes=dist.get_world_size(),
        strategy=strategy,
        precision=precision,
        callbacks=callbacks,
        max_steps=num_steps,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=f"/tmp/cuda_processes_{os.getpid()}",
    )


class Failing(Classifier):
    """Raises on rank 0, some steps later."""

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        if batch_idx == 3 and self.global_rank == 0:
            raise KeyError("of this rank")
        return super().training_step(batch, batch_idx)


def fail(device: str) -> str:
    """Return the error of a training in which rank 0 fails, and after which time."""
    start = time.perf_counter()
    try:
        train(device, "all_gather", {}, Failing())
    except Exception as error:
        return f"{type(error).__name__}: {error} ({time.perf_counter() - start:.1f} s)"
    return "no error"


def loader() -> DataLoader:
    """Return pictures, of which Lightning gives each rank its own."""
    generator = torch.Generator().manual_seed(7)
    labels = torch.randint(10, (2 * STEPS * 16 * dist.get_world_size(),), generator=generator)
    pictures = torch.randn(10, 1, 28, 28, generator=generator)[labels]
    pictures += 2 * torch.randn(pictures.shape, generator=generator)
    return DataLoader(TensorDataset(pictures, labels), batch_size=16)


def collectives(section: Section) -> None:
    """Have one process exchange with itself, over NCCL on a GPU, and compare with no exchange at all."""
    table = section.table({"backend": "{}", "exchange": "`{}`", "rule": "`{}`", "error": "{:.1e}"}, "_one")
    backend, started = "nccl" if section.device.type == "cuda" else "gloo", not dist.is_initialized()
    if started:
        store, timeout = dist.HashStore(), timedelta(seconds=60)
        dist.init_process_group(backend, store=store, rank=0, world_size=1, timeout=timeout)
    generator = torch.Generator().manual_seed(0)
    blocks = [torch.randn(9, columns, generator=generator).to(section.device) for columns in (1_000_003, 50, 300_000)]
    rules: list[Aggregator] = [Mean(), CTMA(NNM(GeometricMedian())), CoordinateWiseMedian()]
    for (name, make), rule in product(EXCHANGES.items(), rules):
        with section.attempt(f"{name} over {backend}"):
            results = []
            for exchange in (make(1), SingleRank()):
                for _ in range(2):  # memory of the first step is used again
                    for block in blocks:
                        exchange.start(block)
                    aggregate = exchange.collect(rule.aggregate(exchange.finish(), 4))
                results.append(torch.cat(aggregate).clone())
            error = float((results[0] - results[1]).norm() / results[1].norm())
            section.expect(error == 0, f"{name} over {backend}: differs from no exchange by {error}")
            table.add(dist.get_backend(), name, type(rule).__name__, error)
    if started:
        dist.destroy_process_group()
