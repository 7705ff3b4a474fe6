"""What is left in ``parameter.grad`` after every backward, of used and unused parameters: the same as by stock DDP."""

from contextlib import nullcontext
from functools import cache
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.strategies import DDPStrategy
from pairs import pairwise
from rank_pool import RankPool
from torch import Tensor, nn
from torch.utils.data import DataLoader
from training import trainer

from lightning_byzantine import ByzantineDDPStrategy
from lightning_byzantine.aggregators import CoordinateWiseMedian, Mean
from lightning_byzantine.optim import DoubleMomentum

OPTIONS: dict[str, dict[str, Any]] = {
    "default": {},
    "Mean": {"aggregator": Mean()},
    "no estimator": {"estimator": None},
    "clipping": {"max_worker_grad_norm": 1e6},
    "shadow": {"shadow": True},
    "sharded": {"exchange": "all_to_all"},
}
ZEROING = ["to None", "never", "never, as views of buckets"]


def inputs(num_batches: int) -> list[Tensor]:
    """Return this rank's batches."""
    rank, num_ranks = torch.distributed.get_rank(), torch.distributed.get_world_size()
    generator = torch.Generator().manual_seed(7)
    return list(torch.randn(num_batches * num_ranks, 3, 4, generator=generator)[rank::num_ranks])


class Networks(pl.LightningModule):
    """Two networks, and layers that are used on some ranks only, or by nobody on every third batch."""

    def __init__(self, unused: bool, zeroing: str) -> None:
        super().__init__()
        self.unused, self.zeroing = unused, zeroing
        self.a, self.b = nn.Linear(4, 2), nn.Linear(4, 1)
        self.on_rank_0, self.on_some_batches = nn.Linear(4, 1), nn.Linear(4, 1)
        self.seen: list[Tensor] = []

    def outputs_of_a(self, inputs: Tensor, batch_idx: int) -> Tensor:
        outputs = self.a(inputs).square().mean()
        if not self.unused or self.global_rank == 0:
            outputs = outputs + self.on_rank_0(inputs).square().mean()
        if not self.unused or batch_idx % 3 == 0:
            outputs = outputs + self.on_some_batches(inputs).square().mean()
        return outputs

    def optimizer_of(self, *parts: nn.Module) -> torch.optim.Optimizer:
        # With weight decay and momentum, it makes a difference whether a gradient is 0 or missing.
        parameters = [parameter for part in parts for parameter in part.parameters()]
        return torch.optim.SGD(parameters, lr=0.05, momentum=0.5, weight_decay=0.1)

    def zero(self, optimizer: Any) -> None:
        if self.zeroing == "to None":
            optimizer.zero_grad()

    def see(self) -> None:
        """Keep all parameters and gradients; NaN for a gradient that is missing."""
        for parameter in self.parameters():
            gradient = torch.full_like(parameter, torch.nan) if parameter.grad is None else parameter.grad
            self.seen += [parameter.detach().flatten().clone(), gradient.flatten().clone()]


class Manual(Networks):
    """The gradient of the first network is accumulated over some batches; the second one takes a step in each."""

    def __init__(self, toggles: bool, accumulate: int, **options: Any) -> None:
        super().__init__(**options)
        self.automatic_optimization = False
        self.toggles, self.accumulate = toggles, accumulate

    def training_step(self, batch: Tensor, batch_idx: int) -> None:
        first, second = self.optimizers()
        synchronizes = (batch_idx + 1) % self.accumulate == 0
        with self.alone(first, synchronizes):
            self.manual_backward(self.outputs_of_a(batch, batch_idx))
            if synchronizes:
                self.see()
                first.step()
                self.zero(first)
        with self.alone(second, True):
            self.manual_backward(self.b(batch).square().mean())
            self.see()
            second.step()
            self.zero(second)
        self.see()

    def alone(self, optimizer: Any, synchronizes: bool) -> Any:
        if self.toggles:
            return optimizer.toggle_model(sync_grad=synchronizes)
        return nullcontext() if synchronizes else self.trainer.strategy.block_backward_sync()

    def configure_optimizers(self) -> list[torch.optim.Optimizer]:
        return [self.optimizer_of(self.a, self.on_rank_0, self.on_some_batches), self.optimizer_of(self.b)]


class Automatic(Networks):
    """Both networks in one loss."""

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        return self.outputs_of_a(batch, batch_idx) + self.b(batch).square().mean()

    def optimizer_zero_grad(self, epoch: int, batch_idx: int, optimizer: torch.optim.Optimizer) -> None:
        self.zero(optimizer)

    def on_before_optimizer_step(self, optimizer: torch.optim.Optimizer) -> None:
        self.see()

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return self.optimizer_of(self)


def gradients_of_fit(
    model: type[Networks], options: dict[str, Any], strategy: dict[str, Any] | None, accumulate: int = 1
) -> Tensor:
    """Return what was seen in six or eight batches; with ``strategy=None``, under stock DDP."""
    torch.manual_seed(5)
    module = model(**options)
    arguments = {"find_unused_parameters": True, "gradient_as_bucket_view": "views" in options["zeroing"]}
    made = DDPStrategy(**arguments) if strategy is None else ByzantineDDPStrategy(**arguments, **strategy)
    loader = DataLoader(inputs(6 if accumulate == 1 else 8), batch_size=None)
    trainer(made, accumulate_grad_batches=accumulate, use_distributed_sampler=False).fit(module, loader)
    return torch.cat(module.seen)


@cache
def of_stock(ranks: RankPool, model: type[Networks], accumulate: int, *options: tuple[str, Any]) -> list[Tensor]:
    return ranks.run(gradients_of_fit, model, dict(options), None, accumulate)


def assert_as_stock(seen: list[Tensor], stock: list[Tensor]) -> None:
    # Rank by rank: what is accumulated without synchronization differs between them.
    for ours, expected in zip(seen, stock, strict=True):
        torch.testing.assert_close(ours, expected, rtol=1e-6, atol=1e-6, equal_nan=True)


@pairwise(
    option=list(OPTIONS),
    toggles=[True, False],
    accumulate=[2, 3],
    unused=[True, False],
    zeroing=ZEROING,
)
def test_accumulation_of_several_networks(
    two_ranks: RankPool, option: str, toggles: bool, accumulate: int, unused: bool, zeroing: str
) -> None:
    options = {"toggles": toggles, "accumulate": accumulate, "unused": unused, "zeroing": zeroing}
    seen = two_ranks.run(gradients_of_fit, Manual, options, OPTIONS[option])
    assert_as_stock(seen, of_stock(two_ranks, Manual, 1, *options.items()))


class TwoWeights(pl.LightningModule):
    """Two weights of 1; the gradient of the first is accumulated over two batches while the second takes steps."""

    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False
        self.a, self.b = nn.Linear(1, 1, bias=False), nn.Linear(1, 1, bias=False)
        for layer in (self.a, self.b):
            nn.init.ones_(layer.weight)
        self.left: list[float] = []

    def training_step(self, batch: Tensor, batch_idx: int) -> None:
        first, second = self.optimizers()
        ones, steps = torch.ones(1, 1), batch_idx % 2 == 1
        with first.toggle_model(sync_grad=steps):
            self.manual_backward(self.a(ones).sum())
            if steps:
                first.step()
                first.zero_grad()
        with second.toggle_model(sync_grad=True):
            self.manual_backward(self.b(ones).sum())
            second.step()
            second.zero_grad()
        if not steps:
            self.left.append(self.a.weight.grad.item())

    def configure_optimizers(self) -> list[torch.optim.Optimizer]:
        return [torch.optim.SGD(layer.parameters(), lr=0.1) for layer in (self.a, self.b)]


def weights_of_fit(strategy: dict[str, Any]) -> tuple[float, list[float]]:
    module = TwoWeights()
    trainer(ByzantineDDPStrategy(find_unused_parameters=True, **strategy)).fit(module, DataLoader(torch.ones(8, 1)))
    return module.a.weight.item(), module.left


@pytest.mark.parametrize("option", OPTIONS)
def test_a_network_that_is_switched_off_keeps_its_gradient(two_ranks: RankPool, option: str) -> None:
    for weight, left in two_ranks.run(weights_of_fit, OPTIONS[option]):
        assert weight == pytest.approx(0.6, abs=1e-6)
        assert left == pytest.approx([1.0, 1.0], abs=1e-6)


class ManualWithLiar(Manual):
    """On one rank, the gradient that is accumulated is wrong, and there is one where others have none."""

    def __init__(self, value: float, **options: Any) -> None:
        super().__init__(**options)
        self.value = value

    def outputs_of_a(self, inputs: Tensor, batch_idx: int) -> Tensor:
        return super().outputs_of_a(inputs, batch_idx) * (self.value if self.global_rank == 0 else 1.0)


@pytest.mark.parametrize("estimator", ["auto", None])
@pytest.mark.parametrize("value", [torch.nan, 1e6])
def test_accumulated_gradients_are_aggregated_by_the_rule(
    three_ranks: RankPool, value: float, estimator: str | None
) -> None:
    options = {"value": value, "toggles": True, "accumulate": 2, "unused": True, "zeroing": "never"}
    strategy = {"aggregator": CoordinateWiseMedian(), "estimator": estimator}
    first, *others = three_ranks.run(gradients_of_fit, ManualWithLiar, options, strategy)
    assert first[-25:].nan_to_num().abs().max() < 10
    for other in others:
        torch.testing.assert_close(other[-50:], first[-50:], rtol=0, atol=0, equal_nan=True)


@pairwise(option=list(OPTIONS), k=[2, 1], accumulate=[1, 2], unused=[True, False], zeroing=ZEROING)
def test_accumulation_by_one_process_for_several_workers(
    two_ranks: RankPool, option: str, k: int, accumulate: int, unused: bool, zeroing: str
) -> None:
    options = {"unused": unused, "zeroing": zeroing}
    strategy = OPTIONS[option] | {"workers_per_process": k, "num_byzantine": 0}
    seen = two_ranks.run(gradients_of_fit, Automatic, options, strategy, k * accumulate)
    assert_as_stock(seen, of_stock(two_ranks, Automatic, k * accumulate, *options.items()))


class HeadsInTurn(pl.LightningModule):
    """Each batch uses one of two heads, which double momentum moves only when it does."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.heads = nn.Linear(4, 4), nn.ModuleList([nn.Linear(4, 1), nn.Linear(4, 1)])
        self.seen: list[Tensor] = []

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        return (self.heads[batch_idx // 2 % 2](self.body(batch).tanh()) - 1).square().mean()

    def see(self, *_: Any) -> None:
        self.seen.append(torch.cat([parameter.detach().flatten().clone() for parameter in self.parameters()]))

    on_train_batch_end = see

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return DoubleMomentum(torch.optim.SGD(self.parameters(), lr=0.1, weight_decay=0.1), min_beta=0.3)


def heads_of_fit(strategy: dict[str, Any]) -> Tensor:
    torch.manual_seed(5)
    module = HeadsInTurn()
    made = ByzantineDDPStrategy(find_unused_parameters=True, aggregator=Mean(), **strategy)
    trainer(made, use_distributed_sampler=False).fit(module, DataLoader(inputs(8), batch_size=None))
    return torch.stack(module.seen)


def heads_of_a_loop() -> Tensor:
    """Return what the optimizer makes of the mean loss of all ranks, in one process and without a strategy."""
    torch.manual_seed(5)
    module = HeadsInTurn()
    optimizer = module.configure_optimizers()
    batches = torch.randn(8 * 2, 3, 4, generator=torch.Generator().manual_seed(7))
    for batch_idx in range(8):
        of_ranks = batches[2 * batch_idx : 2 * batch_idx + 2]

        def closure(batch_idx: int = batch_idx, of_ranks: Tensor = of_ranks) -> Tensor:
            optimizer.zero_grad()
            loss = torch.stack([module.training_step(batch, batch_idx) for batch in of_ranks]).mean()
            loss.backward()
            return loss

        optimizer.step(closure)
        module.see()
    return torch.stack(module.seen)


@pytest.mark.parametrize("exchange", ["all_gather", "all_to_all"])
def test_double_momentum_of_unused_parameters_waits(two_ranks: RankPool, exchange: str) -> None:
    for seen in two_ranks.run(heads_of_fit, {"exchange": exchange}):
        torch.testing.assert_close(seen, heads_of_a_loop(), rtol=0, atol=1e-6)
