"""Whole training steps under stock DDP and under the default rule: ``python tests/benchmarks/steps.py``.

Gloo processes on this machine train a network of ten million parameters by turns with each strategy; a step is forward,
backward with its exchange, and the optimizer. Times are medians over all steps but each turn's first, on rank 0, as
ratios to stock DDP. ``shadow`` is shadow mode
by ``all_to_all``. ``memory`` is the most that a process grew during a step, in units of the gradient.
"""

import argparse
import csv
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median

import torch

sys.path.insert(0, str(Path(__file__).parents[1]))

import torch.distributed as dist
from rank_pool import RankPool
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from lightning_byzantine.aggregators import CTMA, NNM, CoordinateWiseMedian
from lightning_byzantine.estimators import WorkerMomentum
from lightning_byzantine.exchange import AllGather, AllToAll
from lightning_byzantine.hook import AggregationHook
from lightning_byzantine.matrix import WorkerMatrix
from lightning_byzantine.shadow import Shadow

VARIANTS = ["ddp", "shadow", "all_to_all", "all_gather"]
WIDTH = 1824  # three square layers: 10 million parameters


def make(variant: str) -> Callable[[], None]:
    """Return a function that takes one step."""
    torch.manual_seed(0)
    network = nn.Sequential(*[layer for _ in range(3) for layer in (nn.Linear(WIDTH, WIDTH), nn.ReLU())])
    model = DistributedDataParallel(network)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    inputs = torch.randn(8, WIDTH, generator=torch.Generator().manual_seed(dist.get_rank()))
    if variant != "ddp":
        num_workers = dist.get_world_size()
        rule, f = CTMA(NNM(CoordinateWiseMedian())), (num_workers - 1) // 2
        exchange = {"all_gather": AllGather, "all_to_all": AllToAll, "shadow": AllToAll}[variant](num_workers)
        if variant == "shadow":
            shadow = Shadow(rule, beta=0.9)

            def watch(matrix: WorkerMatrix) -> list[torch.Tensor]:
                shadow.report(matrix, f)
                return matrix.materialize(matrix.mean())

            AggregationHook(network, exchange, watch).register(model)
        else:
            hook = AggregationHook(network, exchange, lambda matrix: rule.aggregate(matrix, f), WorkerMomentum())
            hook.register(model)

    def step() -> None:
        optimizer.zero_grad()
        model(inputs).square().mean().backward()
        optimizer.step()

    return step


def measure(turns: int, steps: int) -> dict[str, list[float]]:
    """Return seconds of every step but each turn's first, by variant."""
    contenders = {variant: make(variant) for variant in VARIANTS}
    times: dict[str, list[float]] = {variant: [] for variant in VARIANTS}
    for turn in range(turns + 1):
        for variant, step in contenders.items():
            for index in range(steps + 1):
                dist.barrier()
                start = time.perf_counter()
                step()
                if turn > 0 and index > 0:
                    times[variant].append(time.perf_counter() - start)
    return times


def memory(variant: str) -> float:
    """Return how much the process grew at most during steps, in units of the gradient."""
    step = make(variant)
    for _ in range(2):
        step()
    before = _resident()
    Path("/proc/self/clear_refs").write_text("5")  # forget the peak so far
    for _ in range(3):
        step()
    peak = next(int(line.split()[1]) for line in Path("/proc/self/status").read_text().splitlines() if "VmHWM" in line)
    return (1024 * peak - before) / (4 * 3 * WIDTH * (WIDTH + 1))


def _resident() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def main() -> None:
    """Print the table, and write it to a file if asked to."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--processes", nargs="+", type=int, default=[2, 4, 8])
    parser.add_argument("--turns", type=int, default=4)
    parser.add_argument("--steps", type=int, default=3, help="of one turn")
    parser.add_argument("--csv", type=Path)
    arguments = parser.parse_args()
    rows = []
    print("| processes | strategy | time of a step | memory | seconds |")
    print("|---|---|---|---|---|", flush=True)
    for num_processes in arguments.processes:
        pool = RankPool(num_processes)
        measured = pool.run(measure, arguments.turns, arguments.steps)[0]
        times = {variant: median(seconds) for variant, seconds in measured.items()}
        pool.close()
        for variant in VARIANTS:
            pool = RankPool(num_processes)  # anew, for what another variant has left behind
            grown = pool.run(memory, variant)[0]
            pool.close()
            rows.append((num_processes, variant, times[variant] / times["ddp"], grown, times[variant]))
            print("| {} | `{}` | {:.2f} | {:.1f} | {:.3f} |".format(*rows[-1]), flush=True)
    if arguments.csv is not None:
        with arguments.csv.open("w", newline="") as file:
            csv.writer(file).writerows([("processes", "strategy", "ratio", "memory", "seconds"), *rows])


if __name__ == "__main__":
    main()
