"""What a training step does beside its loss happens once, though double momentum runs it twice."""

import io
import itertools
import random
import re
import warnings
from collections import deque
from collections.abc import Callable
from contextlib import redirect_stdout
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import lightning.pytorch as pl
import numpy as np
import pytest
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.plugins.precision import Precision
from lightning.pytorch.strategies import DDPStrategy
from rank_pool import RankPool
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from torchmetrics import CatMetric, MeanMetric, SumMetric
from training import fit, loader, trainer

from lightning_byzantine import ByzantineDDPStrategy
from lightning_byzantine.optim import DoubleMomentum, DoubleMomentumEstimator
from lightning_byzantine.strategies.second_pass.wrapping import find_or_wrap


class Plain(pl.LightningModule):
    """Batch normalisation and dropout, at a learning rate of 0, so that both runs see the same losses."""

    def __init__(self, lr: float = 0.0) -> None:
        super().__init__()
        self.lr = lr
        self.network = nn.Sequential(nn.Linear(8, 16), nn.BatchNorm1d(16), nn.Tanh(), nn.Dropout(0.5), nn.Linear(16, 1))

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Any:
        loss = nn.functional.mse_loss(self.network(batch[0]), batch[1])
        self.side_effect(loss, batch, batch_idx)
        return loss

    def side_effect(self, loss: Tensor, batch: list[Tensor], batch_idx: int) -> None:
        """Do something that a second pass must not do again."""

    def observed(self) -> Any:
        """Return what became of it."""

    def on_train_start(self) -> None:
        torch.manual_seed(100 + self.global_rank)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=self.lr)


class Buffers(Plain):
    def observed(self) -> Any:
        return [buffer.tolist() for buffer in self.buffers()]


class Logged(Plain):
    def side_effect(self, loss: Tensor, batch: list[Tensor], batch_idx: int) -> None:
        self.log("both", loss, on_step=True, on_epoch=True, sync_dist=True, prog_bar=True)
        self.log_dict({"sum": loss.detach() * 0 + 1}, reduce_fx="sum", on_epoch=True, on_step=False)

    def observed(self) -> Any:
        metrics = self.trainer.callback_metrics | self.trainer.progress_bar_metrics
        return {name: float(value) for name, value in metrics.items()}


class LoggedThroughAHandle(Logged):
    def __init__(self) -> None:
        super().__init__()
        self.report = self.log

    def side_effect(self, loss: Tensor, batch: list[Tensor], batch_idx: int) -> None:
        self.report("both", loss, on_step=True, on_epoch=True, sync_dist=True, reduce_fx="sum")


class ReturnsADict(Logged):
    def training_step(self, batch: list[Tensor], batch_idx: int) -> Any:
        return {"loss": super().training_step(batch, batch_idx), "more": 1}


class LoggedToLogger(Plain):
    def side_effect(self, loss: Tensor, batch: list[Tensor], batch_idx: int) -> None:
        assert self.logger.log_dir is not None
        self.logger.experiment.log_metrics({"direct": float(loss)})
        self.logger.log_metrics({"other": 1.0})

    def observed(self) -> Any:
        if self.global_rank != 0:
            return None
        return Path(self.logger.experiment.metrics_file_path).read_text()


class Metrics(Plain):
    def __init__(self) -> None:
        super().__init__()
        self.mean, self.total, self.values = MeanMetric(), SumMetric(dist_sync_on_step=True), CatMetric()
        self.unregistered = [SumMetric(dist_sync_on_step=True)]

    def side_effect(self, loss: Tensor, batch: list[Tensor], batch_idx: int) -> None:
        self.mean.update(loss)
        self.total(1.0)
        self.unregistered[0](1.0)
        self.values(loss.detach())

    def observed(self) -> Any:
        metrics = (self.mean, self.total, self.values, *self.unregistered)
        return [metric.update_count for metric in metrics], self.mean.weight.item(), len(self.values.value)


class Meter:
    def __init__(self) -> None:
        self.count = 0
        self.history: list[float] = []


class Attributes(Plain):
    def __init__(self) -> None:
        super().__init__()
        self.teacher = nn.Linear(2, 1).requires_grad_(False)
        self.expanded = torch.zeros(1).expand(3)
        self.calls = 0
        self.losses: list[Tensor] = []
        self.nested = {"seen": set(), "recent": deque(maxlen=4)}
        self.memory = torch.zeros(3)
        self.array = np.zeros(2)
        self.meter = Meter()
        self.namespace = SimpleNamespace(count=0)

    def side_effect(self, loss: Tensor, batch: list[Tensor], batch_idx: int) -> None:
        self.calls += 1
        self.losses.append(loss.detach())
        self.nested["seen"].add(len(self.losses))
        self.nested["recent"].append(self.calls)
        self.nested[f"batch {self.calls}"] = batch_idx
        self.memory += 1
        self.teacher.weight.data.add_(1)
        self.array += 1
        self.meter.count += 1
        self.meter.history.append(float(loss))
        self.namespace.count += 1
        self.network[1].momentum = 1 / self.calls

    def observed(self) -> Any:
        arrays = (self.memory.tolist(), self.array.tolist(), self.teacher.weight.tolist())
        state = (self.calls, len(self.losses), self.nested, arrays)
        return state, vars(self.meter), self.namespace.count, self.network[1].momentum


class RandomNumbers(Plain):
    def __init__(self) -> None:
        super().__init__()
        self.generator = torch.Generator().manual_seed(1)
        self.numpy_generator = np.random.default_rng(1)
        self.numpy_state = np.random.RandomState(1)
        self.python_random = random.Random(1)

    def side_effect(self, loss: Tensor, batch: list[Tensor], batch_idx: int) -> None:
        self.numbers()

    def numbers(self) -> list[float]:
        own = [self.numpy_generator.random(), self.numpy_state.rand(), self.python_random.random()]
        shared = [np.random.rand(), random.random(), float(torch.rand(1))]
        return [*own, *shared, float(torch.rand(1, generator=self.generator))]

    def observed(self) -> Any:
        return self.numbers()

    def on_train_start(self) -> None:
        pl.seed_everything(3, verbose=False)


class BatchContainers(Plain):
    def side_effect(self, loss: Tensor, batch: list[Tensor], batch_idx: int) -> None:
        assert len(batch.pop()) == 4
        assert len(batch) == 1

    def observed(self) -> Any:
        return "done"


class Printed(Plain):
    def side_effect(self, loss: Tensor, batch: list[Tensor], batch_idx: int) -> None:
        self.print("step", batch_idx)

    def on_fit_start(self) -> None:
        self.output = io.StringIO()
        self.redirection = redirect_stdout(self.output)
        self.redirection.__enter__()

    def on_fit_end(self) -> None:
        self.redirection.__exit__(None, None, None)

    def observed(self) -> Any:
        return self.output.getvalue()


EFFECTS = [
    Buffers,
    Logged,
    LoggedThroughAHandle,
    ReturnsADict,
    LoggedToLogger,
    Metrics,
    Attributes,
    RandomNumbers,
    BatchContainers,
    Printed,
]


def observe(effect: type[Plain], twice: bool, folder: Any) -> tuple[Any, int, Tensor]:
    """Return what was observed, the number of all-reduces of the training, and the next random numbers."""
    torch.manual_seed(4)
    model = effect()
    estimator = DoubleMomentumEstimator() if twice else None
    logger = CSVLogger(folder, name=f"{twice}") if effect is LoggedToLogger else False
    runner = trainer(ByzantineDDPStrategy(estimator=estimator), max_epochs=2, logger=logger)
    calls = []
    collectives = {
        name: _counting(getattr(torch.distributed, name), calls) for name in ("all_reduce", "all_gather", "broadcast")
    }
    with mock.patch.multiple(torch.distributed, **collectives):
        runner.fit(model, loader(6))
    assert not issubclass(effect, Logged) or calls.count("all_reduce") >= 12
    return model.observed(), len(calls), torch.rand(3)


def _counting(collective: Callable[..., Any], calls: list[str]) -> Callable[..., Any]:
    def count(*args: Any, **kwargs: Any) -> Any:
        calls.append(collective.__name__)
        return collective(*args, **kwargs)

    return count


@pytest.mark.parametrize("effect", EFFECTS)
def test_side_effects_happen_once(two_ranks: RankPool, tmp_path: Any, effect: type[Plain]) -> None:
    once = two_ranks.run(observe, effect, False, tmp_path)
    assert once[0][0]  # there is something to see
    for (seen, collectives, numbers), expected in zip(
        two_ranks.run(observe, effect, True, tmp_path), once, strict=True
    ):
        assert seen == expected[0]
        assert collectives == expected[1]
        assert torch.equal(numbers, expected[2])


class Unnormalised(Plain):
    """Like Plain, without what makes parts of a batch depend on one another."""

    def __init__(self, lr: float = 0.1) -> None:
        super().__init__(lr)
        self.network = nn.Sequential(nn.Linear(8, 16), nn.Tanh(), nn.Linear(16, 1))


class ChangesItsBatch(Unnormalised):
    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        batch[0].add_(0.1)
        return super().training_step(batch, batch_idx)


class ChangesItsParameters(Unnormalised):
    def side_effect(self, loss: Tensor, batch: list[Tensor], batch_idx: int) -> None:
        with torch.no_grad():
            self.network[0].weight.clamp_(-0.1, 0.1)


class Checkpointed(Unnormalised):
    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        return checkpoint(self.network, batch[0].requires_grad_(), use_reentrant=True).square().mean()


class CheckpointedInTheMiddle(Unnormalised):
    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        hidden = self.network[:2](batch[0])
        return checkpoint(self.network[2:], hidden, use_reentrant=True).square().mean()


class NotReentrant(Unnormalised):
    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        hidden = self.network[:2](batch[0])
        return checkpoint(self.network[2:], hidden, use_reentrant=False).square().mean()


class FetchesItsBatches(Unnormalised):
    def training_step(self, dataloader_iter: Any) -> Tensor:
        return self.network(next(dataloader_iter)[0][0]).square().mean()


class Manual(Unnormalised):
    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False


class OwnBackward(Unnormalised):
    def backward(self, loss: Tensor) -> None:
        loss.backward()


class WithoutOptimizer(Unnormalised):
    def configure_optimizers(self) -> None:
        return None


class ReturnsWrapped(Unnormalised):
    def configure_optimizers(self) -> torch.optim.Optimizer:
        return DoubleMomentum(super().configure_optimizers())


def fit_refused(model: type[Plain], strategy: Callable[..., Any], **arguments: Any) -> str:
    with pytest.raises((MisconfigurationException, RuntimeError, TypeError)) as caught:
        fit(strategy(), model(), 4, **arguments)
    return f"{type(caught.value).__name__}: {caught.value}"


def double_momentum() -> ByzantineDDPStrategy:
    return ByzantineDDPStrategy(estimator=DoubleMomentumEstimator())


def static_graph() -> ByzantineDDPStrategy:
    return ByzantineDDPStrategy(estimator=DoubleMomentumEstimator(), static_graph=True)


def no_estimator() -> ByzantineDDPStrategy:
    return ByzantineDDPStrategy(estimator=None)


REFUSED = [
    (
        ChangesItsBatch,
        double_momentum,
        {},
        "MisconfigurationException: .* writes to a tensor of its batch in place",
    ),
    (ChangesItsParameters, double_momentum, {}, "MisconfigurationException: .* this one writes to a parameter"),
    (Checkpointed, double_momentum, {}, "MisconfigurationException: .* use_reentrant=True. Use use_reentrant=False"),
    (CheckpointedInTheMiddle, double_momentum, {}, "MisconfigurationException: .* use_reentrant=True. Use use_reent"),
    (Checkpointed, static_graph, {}, "MisconfigurationException: .* use_reentrant=True. Use use_reentrant=False"),
    (FetchesItsBatches, double_momentum, {}, "MisconfigurationException: .*dataloader_iter.* Take `batch` instead"),
    (Manual, double_momentum, {}, "MisconfigurationException: .*got automatic_optimization=False. Use `strategy='byz"),
    (OwnBackward, double_momentum, {}, "MisconfigurationException: .* a module that overrides `OwnBackward.backward`"),
    (Plain, double_momentum, {"precision": "bf16-true"}, "TypeError: .* float32 or float64, got torch.bfloat16"),
    (Plain, double_momentum, {"precision": "16-true"}, "TypeError: .* float32 or float64, got torch.float16"),
    (WithoutOptimizer, double_momentum, {}, "MisconfigurationException: Double momentum needs an optimizer, got none"),
    (ReturnsWrapped, no_estimator, {}, "MisconfigurationException: A worker sends one estimate only.*estimator=None"),
    (
        ReturnsWrapped,
        DDPStrategy,
        {},
        "RuntimeError: DoubleMomentum got a closure of Lightning's",
    ),
]


@pytest.mark.parametrize(
    ("model", "strategy", "arguments", "message"),
    REFUSED,
    ids=lambda value: getattr(value, "__name__", str(value)[:40]),
)
def test_refuses(
    two_ranks: RankPool, model: type[Plain], strategy: Callable[..., Any], arguments: dict[str, Any], message: str
) -> None:
    for said in two_ranks.run(fit_refused, model, strategy, **arguments):
        assert re.match(message, said), said


def fit_not_reentrant() -> bool:
    return bool(fit(double_momentum(), NotReentrant(), 4).isfinite().all())


def test_checkpointing_works_as_the_error_says(two_ranks: RankPool) -> None:
    assert two_ranks.run(fit_not_reentrant) == [True, True]


class Gathering(Unnormalised):
    def side_effect(self, loss: Tensor, batch: list[Tensor], batch_idx: int) -> None:
        self.all_gather(loss)


class Drawing(Unnormalised):
    def __init__(self) -> None:
        super().__init__()
        self.numbers = itertools.count()


def fit_warned(model: type[Plain], **arguments: Any) -> list[str]:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        fit(double_momentum(), model(), 4, **arguments)
    return [str(warning.message) for warning in caught if "ouble momentum" in str(warning.message)]


@pytest.mark.parametrize(
    ("model", "arguments", "message"),
    [
        (Gathering, {}, "`self.all_gather` in `training_step` runs twice a step"),
        (Drawing, {}, "The module holds an iterator, a count. Double momentum runs"),
        (Unnormalised, {"precision": "bf16-mixed"}, "rounding builds up in double momentum while beta_t goes to 0.0"),
    ],
)
def test_warns(two_ranks: RankPool, model: type[Plain], arguments: dict[str, Any], message: str) -> None:
    first, second = two_ranks.run(fit_warned, model, **arguments)
    assert message in first[0]
    assert second == []


def test_warns_of_synchronised_batch_normalisation() -> None:
    # Without a Trainer, for DDP takes it on CUDA only.
    model = nn.SyncBatchNorm.convert_sync_batchnorm(Plain())
    with pytest.warns(UserWarning, match="SyncBatchNorm communicates twice a step"):
        find_or_wrap(model, [model.configure_optimizers()], DoubleMomentumEstimator(), Precision())


def fit_patched() -> list[int]:
    torch.manual_seed(3)
    model, seen = Unnormalised(), []

    def training_step(batch: list[Tensor], batch_idx: int) -> Tensor:
        seen.append(batch_idx)
        return Unnormalised.training_step(model, batch, batch_idx)

    model.training_step = training_step
    fit(double_momentum(), model, 3)
    assert model.training_step is training_step
    return seen


def test_a_patched_training_step_stays(two_ranks: RankPool) -> None:
    assert two_ranks.run(fit_patched) == [[0, 1, 1, 2, 2]] * 2


class UnderAutocast(Plain):
    """Learns nothing, so that both points are the same, and so must both gradients be."""

    def __init__(self) -> None:
        super().__init__()
        self.network = nn.Sequential(nn.Linear(8, 64), nn.Tanh(), nn.Linear(64, 64), nn.Tanh(), nn.Linear(64, 1))

    def on_train_batch_end(self, *_: Any) -> None:
        estimates = self.trainer.strategy.estimator.worker_state()
        self.estimates = [*getattr(self, "estimates", []), torch.cat(list(estimates.values())).clone()]


def fit_under_autocast() -> list[Tensor]:
    torch.manual_seed(3)
    model = UnderAutocast()
    # d_t = d_{t-1} + (g_t - g~_t), to the last digit
    estimator = DoubleMomentumEstimator(beta=1e-12)
    fit(ByzantineDDPStrategy(estimator=estimator), model, 6, precision="bf16-mixed")
    return model.estimates


def test_both_gradients_are_rounded_alike_under_autocast(two_ranks: RankPool) -> None:
    for first, *others in two_ranks.run(fit_under_autocast):
        for estimate in others:
            torch.testing.assert_close(estimate, first, rtol=0, atol=1e-7)
