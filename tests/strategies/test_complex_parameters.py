"""Complex parameters train as under stock DDP with the mean, and are aggregated as pairs of real numbers."""

from functools import cache
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.strategies import DDPStrategy
from pairs import pairwise
from rank_pool import RankPool
from torch import Tensor, nn
from training import Regression, loader, trainer

from lightning_byzantine import ByzantineDDPStrategy
from lightning_byzantine.aggregators import CTMA, CoordinateWiseMedian, Krum, Mean
from lightning_byzantine.attacks import BitFlip, SignFlip
from lightning_byzantine.callbacks import ByzantineMonitor, ByzantineSimulation
from lightning_byzantine.optim import DoubleMomentum, DoubleMomentumEstimator

DOUBLE_MOMENTUM = DoubleMomentumEstimator(min_beta=0.2, min_gamma=0.2, weighted=False)


class Filtered(Regression):
    """Filters its inputs in the frequency domain, with two filters of complex numbers."""

    def __init__(self, optimizer: str = "SGD") -> None:
        super().__init__(optimizer)
        self.make_filters(torch.randn(5, dtype=torch.cfloat), torch.randn(2, 5, dtype=torch.cdouble).T)

    def make_filters(self, first: Tensor, second: Tensor) -> None:
        self.first, self.second = nn.Parameter(first), nn.Parameter(second)

    def filters(self) -> tuple[Tensor, Tensor]:
        return self.first, self.second

    def forward(self, inputs: Tensor) -> Tensor:
        first, second = self.filters()
        filtered = torch.fft.irfft(torch.fft.rfft(inputs) * first)
        twice = torch.fft.irfft(torch.fft.rfft(filtered).to(second.dtype) * second.sum(1)).float()
        return self.network(filtered + 0.1 * twice)


class InPairs(Filtered):
    """The same, but each complex parameter is one of pairs of real numbers."""

    def make_filters(self, first: Tensor, second: Tensor) -> None:
        super().make_filters(torch.view_as_real(first), torch.view_as_real(second))

    def filters(self) -> tuple[Tensor, Tensor]:
        return torch.view_as_complex(self.first), torch.view_as_complex(self.second)


class History(pl.Callback):
    def __init__(self) -> None:
        self.values: list[Tensor] = []

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *_: Any) -> None:
        parts = [torch.view_as_real(p) if p.is_complex() else p for p in pl_module.parameters()]
        self.values.append(torch.cat([part.detach().double().flatten() for part in parts]))


def fit_filters(
    strategy: Any,
    model: type[Filtered] = Filtered,
    optimizer: str = "SGD",
    callbacks: list[pl.Callback] | None = None,
    ckpt_path: str | None = None,
    accumulate: int = 1,
    **options: Any,
) -> Tensor:
    """Return all parameters after every batch."""
    torch.manual_seed(3)
    history = History()
    options["callbacks"] = [history, *(callbacks or [])]
    trainer(strategy, accumulate_grad_batches=accumulate, **options).fit(
        model(optimizer), loader(8), ckpt_path=ckpt_path
    )
    return torch.stack(history.values)


def fit_robustly(strategy: dict[str, Any], **options: Any) -> Tensor:
    return fit_filters(ByzantineDDPStrategy(**strategy), **options)


@cache
def of_stock(ranks: RankPool, optimizer: str, accumulate: int) -> Tensor:
    return ranks.run(fit_filters, DDPStrategy(), optimizer=optimizer, accumulate=accumulate)[0]


OPTIONS: dict[str, dict[str, Any]] = {
    "default": {"num_byzantine": 0},
    "Mean": {"aggregator": Mean()},
    "no estimator": {"aggregator": Mean(), "estimator": None},
    "clipping": {"aggregator": Mean(), "max_worker_grad_norm": 1e6},
    "shadow": {"shadow": True},
    "sharded": {"aggregator": Mean(), "exchange": "all_to_all"},
}


@pairwise(option=list(OPTIONS), k=[1, 2], view=[False, True], optimizer=["SGD", "Adam"])
def test_trains_as_stock_ddp(two_ranks: RankPool, option: str, k: int, view: bool, optimizer: str) -> None:
    strategy = OPTIONS[option] | {"workers_per_process": k, "gradient_as_bucket_view": view}
    first, other = two_ranks.run(fit_robustly, strategy, optimizer=optimizer, accumulate=k)
    assert torch.equal(first, other)
    torch.testing.assert_close(first, of_stock(two_ranks, optimizer, k), rtol=0, atol=1e-5)


@pytest.mark.parametrize("k", [1, 2])
def test_trains_on_one_device(one_rank: RankPool, k: int) -> None:
    (history,) = one_rank.run(fit_robustly, {"workers_per_process": k}, accumulate=k)
    torch.testing.assert_close(history, of_stock(one_rank, "SGD", k), rtol=0, atol=1e-5)


ROBUST: dict[str, tuple[dict[str, Any], list[pl.Callback]]] = {
    "default": ({}, []),
    "clipping": ({"max_worker_grad_norm": 0.1, "estimator": None}, []),
    "double momentum": ({"estimator": DOUBLE_MOMENTUM}, []),
    "sharded double momentum": ({"estimator": DOUBLE_MOMENTUM, "exchange": "all_to_all"}, []),
    "two a process": ({"aggregator": CTMA(CoordinateWiseMedian()), "workers_per_process": 2}, []),
    "attack": ({}, [ByzantineSimulation(SignFlip(), [1])]),
    "flipped bits": ({"aggregator": Krum()}, [ByzantineSimulation(BitFlip(bit=30), [0])]),
}


@pytest.mark.parametrize("name", ROBUST)
def test_is_aggregated_as_pairs_of_real_numbers(three_ranks: RankPool, name: str) -> None:
    strategy, callbacks = ROBUST[name]
    expected = three_ranks.run(fit_robustly, strategy, model=InPairs, callbacks=callbacks)[0]
    for history in three_ranks.run(fit_robustly, strategy, callbacks=callbacks):
        torch.testing.assert_close(history, expected, rtol=0, atol=1e-5)


def fit_and_resume(strategy: dict[str, Any], folder: Path) -> tuple[Tensor, Tensor]:
    whole = fit_robustly(strategy, max_epochs=2)
    options = {"callbacks": [ModelCheckpoint(folder, save_last=True)], "enable_checkpointing": True}
    fit_robustly(strategy, **options)
    resumed = fit_robustly(strategy, max_epochs=2, ckpt_path=str(folder / "last.ckpt"), **options)
    return whole[-1], resumed[-1]


@pytest.mark.parametrize("name", ["default", "double momentum"])
def test_resumes(three_ranks: RankPool, tmp_path: Path, name: str) -> None:
    strategy = {"aggregator": CTMA(CoordinateWiseMedian())} | ROBUST[name][0]
    for whole, resumed in three_ranks.run(fit_and_resume, strategy, tmp_path):
        assert torch.equal(resumed, whole)


class Drifting(pl.Callback):
    """Changes one rank's filter, as a fault of its memory would."""

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        if batch_idx == 2 and trainer.global_rank == 1:
            pl_module.first.data[3] += 1j


def test_a_rank_that_differs_is_restored(three_ranks: RankPool) -> None:
    first, second, _ = three_ranks.run(fit_robustly, {}, callbacks=[Drifting()])
    assert not torch.equal(second, first)
    restoring = {"check_consistency_every_n_steps": 1, "on_inconsistency": "restore"}
    first, second, third = three_ranks.run(fit_robustly, restoring, callbacks=[Drifting()])
    assert torch.equal(first, third)
    assert torch.equal(second, first)


def test_the_monitor_runs(three_ranks: RankPool) -> None:
    monitored, plain = (
        three_ranks.run(fit_robustly, {}, callbacks=callbacks)[0] for callbacks in ([ByzantineMonitor()], [])
    )
    assert torch.equal(monitored, plain)


def move_alone(in_pairs: bool) -> Tensor:
    """Return what double momentum makes of a point, without any strategy."""
    point = nn.Parameter(torch.tensor([[1.0, 2.0], [3.0, -1.0]]) if in_pairs else torch.tensor([1 + 2j, 3 - 1j]))
    optimizer = DoubleMomentum(torch.optim.SGD([point], lr=0.1), min_beta=0.2)

    def closure() -> Tensor:
        optimizer.zero_grad()
        value = torch.view_as_complex(point) if in_pairs else point
        loss = (value * torch.tensor([1j, 2.0]) - 1).abs().square().sum()
        loss.backward()
        return loss

    for _ in range(5):
        optimizer.step(closure)
    return point.detach() if in_pairs else torch.view_as_real(point.detach())


def test_double_momentum_alone() -> None:
    torch.testing.assert_close(move_alone(in_pairs=False), move_alone(in_pairs=True))
