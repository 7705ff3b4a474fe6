"""Whole steps of large networks in bfloat16, against stock DDP."""

from collections.abc import Callable, Iterator
from functools import partial
from importlib.util import find_spec
from statistics import median
from typing import Any

import lightning.pytorch as pl
import torch
from cuda_training import Clock
from harness import Table
from lightning.pytorch.strategies import DDPStrategy
from on_cuda import Section
from reproduction.networks import ResNet18
from torch import Tensor, nn
from torch.utils.data import DataLoader, IterableDataset

from lightning_byzantine import ByzantineDDPStrategy
from lightning_byzantine.aggregators import Mean
from lightning_byzantine.callbacks import ByzantineMonitor
from lightning_byzantine.estimators import WorkerMomentum

NUM_WORKERS = 4


class Task(pl.LightningModule):
    """A network, a batch of random numbers, and its loss."""

    def __init__(self, network: nn.Module, loss: Callable[[nn.Module, Any], Tensor]) -> None:
        super().__init__()
        self.network = network
        self.loss = loss

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return self.loss(self.network, batch)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=1e-3, momentum=0.9)


class Repeated(IterableDataset[Any]):
    """One batch that is on the device already, again and again."""

    def __init__(self, batch: Any, times: int) -> None:
        self.batch, self.times = batch, times

    def __iter__(self) -> Iterator[Any]:
        return iter([self.batch] * self.times)


def run(section: Section) -> None:
    columns = {"network": "{}", "training": "{}", "batches a step": "{}", "ms": "{:.1f}", "ratio": "{:.3f}"}
    table = section.table(columns | {"peak memory, GiB": "{:.2f}"})
    networks: dict[str, Callable[[Section], Any]] = {"GPT, 124M": gpt, "ResNet-50": resnet}
    if not section.small and find_spec("torchvision") is None:
        print("ResNet-50 is left out: it needs torchvision\n", flush=True)
        del networks["ResNet-50"]
    for name, make in networks.items():
        with section.attempt(name):
            compare(section, table, name, make)


def compare(section: Section, table: Table, name: str, make: Callable[[Section], Any]) -> None:
    several = partial(ByzantineDDPStrategy, workers_per_process=NUM_WORKERS)
    contenders: dict[tuple[str, int], tuple[Callable[[], Any], list[pl.Callback]]] = {
        ("stock", 1): (DDPStrategy, []),
        ("one worker", 1): (ByzantineDDPStrategy, []),
        ("one worker, with all of the engine", 1): (
            lambda: ByzantineDDPStrategy(estimator=WorkerMomentum(transparent=False)),
            [],
        ),
        ("stock", NUM_WORKERS): (DDPStrategy, []),
        ("Mean, no momentum", NUM_WORKERS): (lambda: several(aggregator=Mean(), estimator=None), []),
        ("default, no momentum", NUM_WORKERS): (lambda: several(estimator=None), []),
        ("default", NUM_WORKERS): (several, []),
        ("default, monitor", NUM_WORKERS): (several, [ByzantineMonitor()]),
        ("shadow, monitor", NUM_WORKERS): (lambda: several(shadow=True), [ByzantineMonitor()]),
    }
    times: dict[tuple[str, int], list[float]] = {key: [] for key in contenders}
    peaks: dict[tuple[str, int], float] = {}
    for _ in range(1 if section.small else 2):  # by turns, because clocks change
        for key, (strategy, callbacks) in contenders.items():
            with section.attempt(f"{name}, {key}"):
                seconds, peaks[key] = measure(section, make, strategy(), callbacks, key[1])
                times[key].append(seconds)
                print(f"{name}, {key[0]}, {key[1]} batches a step: {1e3 * seconds:.1f} ms", flush=True)
    for (training, batches), seconds in times.items():
        if seconds:
            ratio = median(seconds) / median(times["stock", batches])
            table.add(name, training, batches, 1e3 * median(seconds), ratio, peaks[training, batches])


def measure(
    section: Section, make: Callable[[Section], Any], strategy: Any, callbacks: list[pl.Callback], batches: int
) -> tuple[float, float]:
    """Return seconds of an optimizer step and the peak of the memory in GiB."""
    if section.device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    torch.manual_seed(1)
    with section.device:
        task, batch = make(section)
    # As many batches with several a step as with one.
    steps, clock = 3 if section.small else 6 + 20 // batches, Clock(first_step=1 if section.small else 4)
    pl.Trainer(
        accelerator=section.device.type,
        devices=1,
        strategy=strategy,
        precision="bf16-mixed",
        callbacks=[*callbacks, clock],
        accumulate_grad_batches=batches,
        max_steps=steps,
        max_epochs=-1,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    ).fit(task, DataLoader(Repeated(batch, batches * steps), batch_size=None))
    peak = torch.cuda.max_memory_allocated() if section.device.type == "cuda" else 0
    return clock.seconds, peak / 2**30


def resnet(section: Section) -> tuple[Task, Any]:
    if section.small:
        network: nn.Module = ResNet18(width=8)
        pictures = torch.randn(8, 3, 32, 32)
    else:
        from torchvision.models import resnet50

        network = resnet50(num_classes=1000).to(memory_format=torch.channels_last)
        pictures = torch.randn(64, 3, 224, 224).to(memory_format=torch.channels_last)
    labels = torch.randint(10, (len(pictures),))
    return Task(network, lambda net, batch: nn.functional.cross_entropy(net(batch[0]), batch[1])), [pictures, labels]


class GPT(nn.Module):
    """GPT-2's smallest network, with the input's vectors as the output's: 124 million parameters.

    Source: Radford et al., "Language Models are Unsupervised Multitask Learners", 2019.
    """

    def __init__(self, layers: int = 12, width: int = 768, words: int = 50_257, length: int = 1024) -> None:
        super().__init__()
        self.words, self.positions = nn.Embedding(words, width), nn.Embedding(length, width)
        self.blocks = nn.ModuleList(
            nn.TransformerEncoderLayer(
                width, width // 64, 4 * width, 0.0, nn.functional.gelu, batch_first=True, norm_first=True
            )
            for _ in range(layers)
        )
        self.norm = nn.LayerNorm(width)

    def forward(self, tokens: Tensor) -> Tensor:
        features = self.words(tokens) + self.positions.weight[: tokens.shape[1]]
        mask = nn.Transformer.generate_square_subsequent_mask(tokens.shape[1], device=tokens.device)
        for block in self.blocks:
            features = block(features, src_mask=mask, is_causal=True)
        return self.norm(features) @ self.words.weight.T


def gpt(section: Section) -> tuple[Task, Any]:
    network = GPT(layers=2, width=64, words=500, length=64) if section.small else GPT()
    words, length = network.words.num_embeddings, network.positions.num_embeddings
    tokens = torch.randint(words, (2 if section.small else 8, length))

    def loss(net: nn.Module, batch: Tensor) -> Tensor:
        return nn.functional.cross_entropy(net(batch)[:, :-1].flatten(0, 1), batch[:, 1:].flatten())

    return Task(network, loss), tokens
