"""Whole training steps of a divided model under PyTorch's own HSDP, and under the default rule across replicas.

Gloo processes on this machine train a small GPT, the transformer of the examples, by turns: with ``fully_shard`` on a
mesh of replicas and parts, which averages over all, and with ``robust_fsdp`` and either exchange. Times are medians
over all steps but each turn's first, on rank 0, as ratios to HSDP. ``kept`` is by how much a process is larger than
under HSDP between steps, and ``memory`` is the most that it grows by during a step, both in parts: what one rank holds
of the gradient. The momentum's two copies are among what is kept.
"""

import argparse
from collections.abc import Callable
from pathlib import Path

import torch
import torch.distributed as dist
from harness import Table, by_turns, in_new_ranks, memory_of
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from transformer import BYTES, Config, Transformer

from lightning_byzantine.hooks import robust_fsdp

STOCK = "hsdp"
VARIANTS = [STOCK, "all_to_all", "all_gather"]
CONFIG = Config(layers=4, heads=4, width=256, context=64)
BATCH = 16


def make(variant: str, shape: tuple[int, int]) -> tuple[Callable[[], None], float]:
    """Return a function that takes one step, and how many parameters are in one part."""
    torch.manual_seed(0)
    model = Transformer(CONFIG)
    size = sum(parameter.numel() for parameter in model.parameters()) / shape[1]
    mesh = init_device_mesh("cpu", shape, mesh_dim_names=("replicate", "shard"))
    for part in (*model.layers, model):
        fully_shard(part, mesh=mesh if variant == STOCK else mesh["shard"])
    hook = None if variant == STOCK else robust_fsdp(model, mesh, exchange=variant)  # type: ignore[arg-type]
    optimizer = model.configure_optimizers()
    generator = torch.Generator().manual_seed(dist.get_rank())

    def step() -> None:
        text = torch.randint(BYTES, (BATCH, CONFIG.context), generator=generator)
        optimizer.zero_grad()
        model.loss([text]).backward()
        if hook is not None:
            hook.aggregate()
        optimizer.step()

    return step, size


def measure(shape: tuple[int, int], turns: int, steps: int) -> dict[str, float]:
    contenders = {variant: make(variant, shape)[0] for variant in VARIANTS}
    return by_turns(contenders, turns, steps, warm_up=1, ready=dist.barrier)


def memory(variant: str, shape: tuple[int, int]) -> tuple[float, float]:
    """Return how much the process grew at most during steps, and how large it is between them, in parts."""
    step, size = make(variant, shape)
    grown, kept = memory_of(step)
    return grown / (4 * size), kept / (4 * size)


def shape_of(text: str) -> tuple[int, int]:
    replicas, parts = map(int, text.split("x"))
    return replicas, parts


def add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--shapes", nargs="+", type=shape_of, default=[(2, 2), (4, 2)], help="replicas x parts")
    parser.add_argument("--turns", type=int, default=3)
    parser.add_argument("--steps", type=int, default=3, help="of one turn")
    parser.add_argument("--csv", type=Path)


def run(arguments: argparse.Namespace) -> None:
    columns = {"replicas x parts": "{}", "": "`{}`", "time of a step": "{:.2f}", "memory": "{:.1f}", "kept": "{:.1f}"}
    table = Table(columns | {"seconds": "{:.3f}"}, arguments.csv)
    for shape in arguments.shapes:
        times = in_new_ranks(shape[0] * shape[1], measure, shape, arguments.turns, arguments.steps)
        sizes = {variant: in_new_ranks(shape[0] * shape[1], memory, variant, shape) for variant in VARIANTS}
        for variant, (grown, size) in sizes.items():
            ratio, kept = times[variant] / times[STOCK], size - sizes[STOCK][1]
            table.add(f"{shape[0]} x {shape[1]}", variant, ratio, grown, kept, times[variant])
