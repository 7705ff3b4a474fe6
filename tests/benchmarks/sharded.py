"""Steps of models divided by FSDP2: stock HSDP, and the default rule across replicas.

Gloo processes on this machine, in replicas of two, take steps by turns: forward, backward, the exchange, and the
optimizer. Times are medians over all steps but each turn's first, on rank 0, as ratios to PyTorch's HSDP. ``memory`` is
the most that a process grows by during a step, in units of the gradient of the whole model, and ``kept`` is by how much
it is larger than under HSDP between steps. Networks: ``resnet``, a ResNet-18 on 32 images of 32 x 32 pixels a process;
``gpt``, a transformer with 3.2 million parameters on 8 texts of 64 bytes.
"""

import argparse
from collections.abc import Callable
from pathlib import Path

import torch
import torch.distributed as dist
from harness import Table, by_turns
from reproduction.networks import ResNet18
from steps import in_new_ranks, memory_of
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from transformer import BYTES, Config, Transformer

from lightning_byzantine.aggregation.engine import AggregationEngine
from lightning_byzantine.aggregation.observers import Observers
from lightning_byzantine.aggregation.quarantine import Quarantine
from lightning_byzantine.aggregation.robust_aggregation import RobustAggregation
from lightning_byzantine.aggregation.shard_layout import ShardLayout
from lightning_byzantine.aggregation.sharded_gradients import ShardedGradients
from lightning_byzantine.aggregators import PersistentFilter
from lightning_byzantine.estimators import WorkerMomentum
from lightning_byzantine.exchange import Shards, make_exchange

VARIANTS = ["hsdp", "all_to_all", "all_gather"]
SIZE_OF_REPLICA = 2


def make_network(name: str) -> tuple[nn.Module, Tensor]:
    generator = torch.Generator().manual_seed(dist.get_rank())
    torch.manual_seed(0)
    if name == "resnet":
        return ResNet18(), torch.randn(32, 3, 32, 32, generator=generator)
    config = Config(layers=4, heads=4, width=256, context=64)
    return Transformer(config), torch.randint(BYTES, (8, 64), generator=generator)


def divide(network: nn.Module, mesh: DeviceMesh) -> None:
    parts = network.layers if isinstance(network, Transformer) else network.children()
    for part in parts:
        if any(True for _ in part.parameters()):
            fully_shard(part, mesh=mesh)
    fully_shard(network, mesh=mesh)


def make(variant: str, name: str) -> tuple[Callable[[], None], int]:
    """Return a function that takes one step, and the number of parameters."""
    network, inputs = make_network(name)
    shape = (dist.get_world_size() // SIZE_OF_REPLICA, SIZE_OF_REPLICA)
    mesh = init_device_mesh("cpu", shape, mesh_dim_names=("across", "within"))
    divide(network, mesh if variant == "hsdp" else mesh["within"])
    optimizer = torch.optim.SGD(network.parameters(), lr=0.01, momentum=0.9)
    aggregate = (lambda: None) if variant == "hsdp" else _aggregation(network, mesh, variant)

    def step() -> None:
        optimizer.zero_grad()
        network(inputs).square().mean().backward()
        aggregate()
        optimizer.step()

    return step, sum(parameter.numel() for parameter in network.parameters())


def _aggregation(network: nn.Module, mesh: DeviceMesh, exchange: str) -> Callable[[], None]:
    parameters, num_workers = dict(network.named_parameters()), mesh.size(0)
    rule = RobustAggregation(PersistentFilter(), (num_workers - 1) // 2, Quarantine(), Observers())
    shards = Shards(mesh.get_group("across"), mesh.get_group("within"))
    engine = AggregationEngine(parameters, rule, make_exchange(exchange, num_workers, None, shards), WorkerMomentum())
    return ShardedGradients(engine, ShardLayout(parameters, {})).aggregate


def measure(network: str, turns: int, steps: int) -> dict[str, float]:
    contenders = {variant: make(variant, network)[0] for variant in VARIANTS}
    return by_turns(contenders, turns, steps, warm_up=1, ready=dist.barrier)


def memory(variant: str, network: str) -> tuple[float, float]:
    return memory_of(*make(variant, network))


def add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--processes", nargs="+", type=int, default=[4, 8])
    parser.add_argument("--networks", nargs="+", choices=["resnet", "gpt"], default=["resnet", "gpt"])
    parser.add_argument("--turns", type=int, default=3)
    parser.add_argument("--steps", type=int, default=2, help="of one turn")
    parser.add_argument("--csv", type=Path)


def run(arguments: argparse.Namespace) -> None:
    columns = {"processes": "{}", "network": "{}", "exchange": "`{}`", "time of a step": "{:.2f}", "memory": "{:.2f}"}
    table = Table(columns | {"kept": "{:.2f}", "seconds": "{:.3f}"}, arguments.csv)
    for num_processes in arguments.processes:
        for network in arguments.networks:
            times = in_new_ranks(num_processes, measure, network, arguments.turns, arguments.steps)
            sizes = {variant: in_new_ranks(num_processes, memory, variant, network) for variant in VARIANTS}
            for variant, (grown, size) in sizes.items():
                ratio, kept = times[variant] / times["hsdp"], size - sizes["hsdp"][1]
                table.add(num_processes, network, variant, ratio, grown, kept, times[variant])
