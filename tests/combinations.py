"""Modules to train and options to train them with, for tests of all that trains."""

from collections.abc import Callable
from contextlib import nullcontext
from functools import cache
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.plugins.precision import MixedPrecision
from lightning.pytorch.strategies import DDPStrategy
from rank_pool import RankPool
from torch import Tensor, nn
from training import Regression, fit

from lightning_byzantine import ByzantineDDPStrategy
from lightning_byzantine.aggregators import (
    CTMA,
    NNM,
    Aggregator,
    Bucketing,
    CoordinateWiseMedian,
    CoordinateWiseTrimmedMean,
    GeometricMedian,
    Krum,
    Mean,
    MultiKrum,
)


class UnusedOnSomeRanks(Regression):
    """One layer that rank 1 never uses, one that nobody uses on odd batches, and one that is frozen."""

    def __init__(self, optimizer: str = "SGD") -> None:
        super().__init__(optimizer)
        self.not_on_rank_1 = nn.Linear(8, 1)
        self.on_even_batches = nn.Linear(8, 1)
        self.frozen = nn.Linear(8, 1).requires_grad_(False)
        self.batch_idx = 0

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        self.batch_idx = batch_idx
        return super().training_step(batch, batch_idx)

    def forward(self, inputs: Tensor) -> Tensor:
        outputs = self.network(inputs) + self.frozen(inputs)
        if self.global_rank != 1:
            outputs = outputs + self.not_on_rank_1(inputs)
        if self.batch_idx % 2 == 0:
            outputs = outputs + self.on_even_batches(inputs)
        return outputs


class MixedDtypes(Regression):
    """A float64 layer between float32 ones, so that DDP makes buckets of both."""

    def __init__(self, optimizer: str = "SGD") -> None:
        super().__init__(optimizer)
        self.network[2].double()

    def forward(self, inputs: Tensor) -> Tensor:
        hidden = self.network[1](self.network[0](inputs)).double()
        return self.network[4](self.network[3](self.network[2](hidden)).float())


class BatchNormed(Regression):
    def __init__(self, optimizer: str = "SGD") -> None:
        super().__init__(optimizer)
        self.network = nn.Sequential(nn.Linear(8, 16, bias=False), nn.BatchNorm1d(16), nn.Tanh(), nn.Linear(16, 1))


class CompiledNetwork(Regression):
    def __init__(self, optimizer: str = "SGD") -> None:
        super().__init__(optimizer)
        # The graph is captured and split as ever; only the C++ compiler, minutes on two cores, is left out.
        self.network = torch.compile(self.network, backend="aot_eager")


class TwoOptimizers(Regression):
    """Manual optimization in the manner of a GAN: two networks, each with a backward and an optimizer of its own."""

    def __init__(self, optimizer: str = "SGD") -> None:
        super().__init__(optimizer)
        self.automatic_optimization = False
        self.critic = nn.Linear(9, 1)

    def training_step(self, batch: list[Tensor], batch_idx: int) -> None:
        inputs, targets = batch
        first, second = self.optimizers()
        self.toggle_optimizer(first)
        self.manual_backward(nn.functional.mse_loss(self.network(inputs), targets))
        first.step()
        first.zero_grad()
        self.untoggle_optimizer(first)
        self.toggle_optimizer(second)
        pairs = torch.cat([inputs, self.network(inputs).detach()], dim=1)
        self.manual_backward(self.critic(pairs).square().mean())
        self.clip_gradients(second, gradient_clip_val=0.5)
        second.step()
        second.zero_grad()
        self.untoggle_optimizer(second)

    def configure_optimizers(self) -> list[torch.optim.Optimizer]:
        kind = torch.optim.Adam if self.optimizer == "Adam" else torch.optim.SGD
        return [kind(self.network.parameters(), lr=1e-2), kind(self.critic.parameters(), lr=1e-2)]


# name: model, arguments of the strategy, arguments of the Trainer
COMBINATIONS: dict[str, tuple[type[pl.LightningModule], dict[str, Any], dict[str, Any]]] = {
    "plain": (Regression, {}, {}),
    "many buckets": (Regression, {"bucket_cap_mb": 0.0005}, {}),
    "batch norm": (BatchNormed, {}, {}),
    "find_unused_parameters": (UnusedOnSomeRanks, {"find_unused_parameters": True}, {}),
    "static_graph": (Regression, {"static_graph": True}, {}),
    "gradient_as_bucket_view": (Regression, {"gradient_as_bucket_view": True, "bucket_cap_mb": 0.0005}, {}),
    "accumulate_grad_batches": (Regression, {}, {"accumulate_grad_batches": 3}),
    "accumulation, bucket view": (Regression, {"gradient_as_bucket_view": True}, {"accumulate_grad_batches": 2}),
    "clip by norm": (Regression, {}, {"gradient_clip_val": 0.1}),
    "clip by value": (Regression, {}, {"gradient_clip_val": 0.01, "gradient_clip_algorithm": "value"}),
    "bf16-mixed": (Regression, {}, {"precision": "bf16-mixed"}),
    "64-true": (Regression, {}, {"precision": "64-true"}),
    "mixed dtypes": (MixedDtypes, {}, {}),
    "torch.compile": (CompiledNetwork, {}, {}),
    "manual optimization": (TwoOptimizers, {"find_unused_parameters": True}, {}),
}


def fit_combination(name: str, optimizer: str, strategy: Callable[..., Any], **arguments: Any) -> Tensor:
    model, strategy_arguments, trainer_arguments = COMBINATIONS[name]
    torch.manual_seed(3)
    return fit(strategy(**strategy_arguments, **arguments), model(optimizer), **trainer_arguments)


@cache
def stock_history(ranks: RankPool, name: str, optimizer: str) -> Tensor:
    """Return what stock DDP makes of a combination, which many tests compare with."""
    return ranks.run(fit_combination, name, optimizer, DDPStrategy)[0]


RULES: list[Aggregator] = [
    Mean(),
    CoordinateWiseMedian(),
    CoordinateWiseTrimmedMean(),
    GeometricMedian(),
    Krum(),
    MultiKrum(),
    CTMA(CoordinateWiseMedian()),
    CTMA(GeometricMedian()),
    NNM(CoordinateWiseTrimmedMean()),
    Bucketing(GeometricMedian()),
    CTMA(NNM(CoordinateWiseMedian())),
]


class FaultyRank(Regression):
    """One rank's loss is not finite from batch 3 to batch 5, or for ever."""

    def __init__(self, ranks: list[int], until: int = 10**9, value: float = torch.nan) -> None:
        super().__init__()
        self.ranks, self.until, self.value = ranks, until, value

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        loss = super().training_step(batch, batch_idx)
        faulty = self.global_rank in self.ranks and 3 <= batch_idx < self.until
        return loss * self.value if faulty else loss


def fit_faulty(ranks: list[int], until: int = 10**9, value: float = torch.nan, **arguments: Any) -> Tensor:
    torch.manual_seed(3)
    return fit(ByzantineDDPStrategy(**arguments), FaultyRank(ranks, until, value))


class Overflowing(Regression):
    """Under a loss scale, the gradient of some ranks overflows at batch 3."""

    def __init__(self, ranks: list[int]) -> None:
        super().__init__()
        self.ranks = ranks
        self.scales: list[float] = []

    def on_train_batch_end(self, *_: Any) -> None:
        self.scales.append(self.trainer.precision_plugin.scaler.get_scale())

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        loss = super().training_step(batch, batch_idx)
        return loss * 1e38 if batch_idx == 3 and self.global_rank in self.ranks else loss


def fit_scaled(ranks: list[int], **arguments: Any) -> tuple[Tensor, list[float]]:
    torch.manual_seed(3)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10, growth_interval=4)
    model = Overflowing(ranks)
    plugin = MixedPrecision("16-mixed", "cpu", scaler=scaler)
    # bfloat16 autocast would hide what the scale does; the forward pass stays in float32.
    plugin.autocast_context_manager = nullcontext
    return fit(ByzantineDDPStrategy(**arguments), model, plugins=[plugin]), model.scales
