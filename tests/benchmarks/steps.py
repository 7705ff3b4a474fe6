"""Whole training steps under stock DDP and under the default rule.

``unchecked`` is ``all_gather`` without the digests by which ranks find out who tells others different things. Gloo
processes on this machine train a network of about ten million parameters by turns with each strategy; a step is
forward, backward with its exchange, and the optimizer. Times are medians over all steps but each turn's first, on rank
0, as ratios to stock DDP. ``memory`` is the most that a process grows by during a step, in units of the gradient, and
``kept`` is by how much it is larger than under stock DDP between steps; the momentum's two copies are among that.
Networks: ``resnet``, a ResNet-18 on 32 images of 32 x 32 pixels a process; ``linear``, ten square layers on 16
vectors, which does hardly anything but exchange gradients.

``--digests`` measures what it takes under ``all_gather`` to find out whether all ranks have aggregated the same, in a
rank's processor time, and as a share of a step's: digests, messages about them, and what a second attempt would need.

``--floor`` measures an exchange of ten million random numbers a worker alone, with ``all_gather`` and the default rule,
as a ratio to what it can't do without: gathering the same bytes, one matrix of inner products, and one combination.
"""

import argparse
import time
from collections.abc import Callable
from pathlib import Path
from statistics import mean
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
from harness import Table, by_turns, in_new_ranks, memory_of, ranks
from reproduction.networks import ResNet18
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from lightning_byzantine.aggregation.ddp_hook import AggregationHook
from lightning_byzantine.aggregation.engine import AggregationEngine
from lightning_byzantine.aggregation.observers import Observers
from lightning_byzantine.aggregation.quarantine import Quarantine
from lightning_byzantine.aggregation.robust_aggregation import RobustAggregation
from lightning_byzantine.aggregation.shadow_aggregation import ShadowAggregation
from lightning_byzantine.aggregators import PersistentFilter
from lightning_byzantine.estimators import WorkerMomentum
from lightning_byzantine.exchange import AllGather, make_exchange
from lightning_byzantine.hooks import robust_ddp

# Measured by turns in the same processes: all together would need more memory than a small machine has.
TOGETHER = [["ddp", "shadow", "all_to_all"], ["ddp", "all_gather", "unchecked"]]
WIDTH = 900  # ten square layers: 8 million parameters
BLOCK = 2_500_000


def make_network(name: str) -> tuple[nn.Module, tuple[int, ...]]:
    """Return a network, and the shape of a batch."""
    torch.manual_seed(0)
    if name == "resnet":
        return ResNet18(), (32, 3, 32, 32)
    layers = [layer for _ in range(10) for layer in (nn.Linear(WIDTH, WIDTH), nn.ReLU())]
    return nn.Sequential(*layers), (16, WIDTH)


def make(variant: str, name: str) -> tuple[Callable[[], None], int]:
    """Return a function that takes one step, and the number of parameters."""
    network, shape = make_network(name)
    model = DistributedDataParallel(network)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9)
    if variant in ("all_to_all", "all_gather"):
        robust_ddp(model, exchange=variant)  # type: ignore[arg-type]
    elif variant != "ddp":
        _aggregate_by_parts(variant, model, network)

    # Other batches in every step: workers that differ for good are another case for the rule.
    generator = torch.Generator().manual_seed(dist.get_rank())

    def step() -> None:
        inputs = torch.randn(shape, generator=generator)
        optimizer.zero_grad()
        model(inputs).square().mean().backward()
        optimizer.step()

    return step, sum(parameter.numel() for parameter in network.parameters())


def _aggregate_by_parts(variant: str, model: DistributedDataParallel, network: nn.Module) -> None:
    """Do what no public function does."""
    num_workers, observers = dist.get_world_size(), Observers()
    rule, f = PersistentFilter(), (num_workers - 1) // 2
    if variant == "shadow":
        observers.add(lambda report: None)  # without anybody to see it, the rule would not be applied
        aggregation: Any = ShadowAggregation(rule, f, beta=0.9, observers=observers)
    else:
        aggregation = RobustAggregation(rule, f, Quarantine(), observers)
    exchange = make_exchange("all_to_all" if variant == "shadow" else "all_gather", num_workers)
    engine = AggregationEngine(dict(network.named_parameters()), aggregation, exchange, WorkerMomentum())
    AggregationHook(engine, network).register(model)


def measure(network: str, variants: list[str], turns: int, steps: int) -> dict[str, float]:
    contenders = {variant: make(variant, network)[0] for variant in variants}
    return by_turns(contenders, turns, steps, warm_up=1, ready=dist.barrier)


def measure_digests(network: str, steps: int) -> tuple[float, float]:
    """Return seconds of a rank's processor time for digests, and for all of a step."""
    step, _ = make("all_gather", network)
    in_all, in_attempts = Stopwatch(), Stopwatch()
    agreed = AllGather.agreed

    def timed(exchange: AllGather, matrix: Any, attempt: Callable[[Any], Any], save: Callable[[], Any]) -> Any:
        return in_all.time(agreed, exchange, matrix, lambda received: in_attempts.time(attempt, received), save)

    step()
    with mock.patch.object(AllGather, "agreed", timed):
        began = time.process_time()
        for _ in range(steps):
            step()
        total = time.process_time() - began
    return (in_all.seconds - in_attempts.seconds) / steps, total / steps


class Stopwatch:
    """Adds up the processor time of calls in their thread."""

    def __init__(self) -> None:
        self.seconds = 0.0

    def time(self, function: Callable[..., Any], *arguments: Any) -> Any:
        began = time.thread_time()
        try:
            return function(*arguments)
        finally:
            self.seconds += time.thread_time() - began


def measure_floor(turns: int, steps: int) -> dict[str, float]:
    m = dist.get_world_size()
    rule, exchange = PersistentFilter(), AllGather(m)
    generator = torch.Generator().manual_seed(dist.get_rank())
    own = torch.randn(4 * BLOCK, generator=generator)
    received = torch.empty(4, m, BLOCK)
    result, weights = torch.empty(BLOCK), torch.full((m,), 1 / m)

    def robust() -> None:
        for block in own.split(BLOCK):
            exchange.start(block[None])
        exchange.collect(rule.aggregate(exchange.finish(), (m - 1) // 2))

    def floor() -> None:
        pairs = zip(received, own.split(BLOCK), strict=True)
        for work in [dist.all_gather_single(rows.view(-1), block, async_op=True) for rows, block in pairs]:
            work.wait()
        gram = torch.zeros(m, m)
        for rows in received:
            gram.addmm_(rows, rows.T)
        for rows in received:
            torch.mv(rows.T, weights, out=result)

    return by_turns({"floor": floor, "all_gather": robust}, turns, steps, warm_up=1, ready=dist.barrier)


def memory(variant: str, network: str) -> tuple[float, float]:
    """Return how much the process grew at most during steps, and how large it is between them, in gradients."""
    step, num_parameters = make(variant, network)
    grown, size = memory_of(step)
    return grown / (4 * num_parameters), size / (4 * num_parameters)


def add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--processes", nargs="+", type=int, default=[2, 4, 8])
    parser.add_argument("--networks", nargs="+", choices=["resnet", "linear"], default=["resnet", "linear"])
    parser.add_argument("--turns", type=int, default=3)
    parser.add_argument("--steps", type=int, default=2, help="of one turn")
    parser.add_argument("--floor", action="store_true", help="measure the exchange alone")
    parser.add_argument("--digests", action="store_true", help="measure digests alone")
    parser.add_argument("--csv", type=Path)


def run(arguments: argparse.Namespace) -> None:
    if arguments.floor:
        run_floor(arguments)
        return
    if arguments.digests:
        run_digests(arguments)
        return
    columns = {"processes": "{}", "network": "{}", "strategy": "`{}`", "time of a step": "{:.2f}", "memory": "{:.1f}"}
    table = Table(columns | {"kept": "{:.1f}", "seconds": "{:.3f}"}, arguments.csv)
    for num_processes in arguments.processes:
        for network in arguments.networks:
            _, stock = in_new_ranks(num_processes, memory, "ddp", network)
            for variants in TOGETHER:
                times = in_new_ranks(num_processes, measure, network, variants, arguments.turns, arguments.steps)
                for variant in variants:
                    grown, size = in_new_ranks(num_processes, memory, variant, network)
                    ratio, seconds = times[variant] / times["ddp"], times[variant]
                    table.add(num_processes, network, variant, ratio, grown, size - stock, seconds)


def run_digests(arguments: argparse.Namespace) -> None:
    columns = {"processes": "{}", "network": "{}", "digests, ms": "{:.1f}", "step, ms": "{:.0f}", "share": "{:.2%}"}
    table = Table(columns, arguments.csv)
    for num_processes in arguments.processes:
        for network in arguments.networks:
            with ranks(num_processes) as pool:
                measured = pool.run(measure_digests, network, arguments.turns * arguments.steps)
            digests, total = map(mean, zip(*measured, strict=True))
            table.add(num_processes, network, 1000 * digests, 1000 * total, digests / total)


def run_floor(arguments: argparse.Namespace) -> None:
    columns = {"processes": "{}", "`all_gather` and the default rule": "{:.2f}", "seconds": "{:.3f}"}
    table = Table(columns, arguments.csv)
    for num_processes in arguments.processes:
        times = in_new_ranks(num_processes, measure_floor, arguments.turns, arguments.steps)
        table.add(num_processes, times["all_gather"] / times["floor"], times["all_gather"])
