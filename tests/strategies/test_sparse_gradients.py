"""Sparse gradients: as under stock DDP where that trains, refused before the first step where a rule aggregates."""

from functools import cache
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.strategies import DDPStrategy
from pairs import pairwise
from rank_pool import RankPool
from torch import Tensor, nn
from torch.utils.data import DataLoader
from training import trainer

from lightning_byzantine import ByzantineDDPStrategy
from lightning_byzantine.aggregators import Krum
from lightning_byzantine.attacks import SignFlip
from lightning_byzantine.callbacks import ByzantineMonitor, ByzantineSimulation
from lightning_byzantine.optim import DoubleMomentumEstimator

OPTIMIZERS: dict[str, Any] = {
    "SGD": lambda parameters: torch.optim.SGD(parameters, lr=0.1, momentum=0.5),
    "Adagrad": lambda parameters: torch.optim.Adagrad(parameters, lr=0.1),
    "SparseAdam": lambda parameters: torch.optim.SparseAdam(list(parameters), lr=0.1),
}


class Embedded(pl.LightningModule):
    """Embeddings of few of the tokens; one token's gradient is 0, but there."""

    def __init__(self, optimizer: str, dense_part: bool = False) -> None:
        super().__init__()
        self.optimizer = optimizer
        self.words = nn.Embedding(9, 3, sparse=True, padding_idx=0)
        self.bags = nn.ModuleList([nn.EmbeddingBag(9, 3, mode=mode, sparse=True) for mode in ("sum", "mean")])
        self.dense = nn.Linear(3, 1) if dense_part else nn.Identity()
        self.history: list[Tensor] = []

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        weights = (batch != 3).float()[..., None]
        embedded = (self.words(batch) * weights).sum(1)
        for bag in self.bags:
            embedded = embedded + bag(batch)
        return (self.dense(embedded) - 1).square().mean()

    def on_train_batch_end(self, *_: Any) -> None:
        self.history.append(torch.cat([parameter.detach().flatten().clone() for parameter in self.parameters()]))

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return OPTIMIZERS[self.optimizer](self.parameters())


def fit_embedded(
    strategy: dict[str, Any] | None,
    optimizer: str = "SGD",
    accumulate: int = 1,
    dense_part: bool = False,
    callbacks: list[pl.Callback] | None = None,
) -> Tensor:
    """Return all parameters after every batch; with ``strategy=None``, under stock DDP."""
    torch.manual_seed(3)
    rank, num_ranks = torch.distributed.get_rank(), torch.distributed.get_world_size()
    generator = torch.Generator().manual_seed(7)
    batches = torch.randint(9, (8 * num_ranks, 2, 2), generator=generator)[rank::num_ranks]
    model = Embedded(optimizer, dense_part)
    made = DDPStrategy() if strategy is None else ByzantineDDPStrategy(**strategy)
    options = {"accumulate_grad_batches": accumulate, "use_distributed_sampler": False, "callbacks": callbacks or []}
    trainer(made, **options).fit(model, DataLoader(list(batches), batch_size=None))
    return torch.stack(model.history)


@cache
def of_stock(ranks: RankPool, optimizer: str, accumulate: int, dense_part: bool) -> Tensor:
    return ranks.run(fit_embedded, None, optimizer, accumulate, dense_part)[0]


@pairwise(
    exchange=["all_gather", "all_to_all"], k=[1, 2], accumulate=[1, 2], optimizer=list(OPTIMIZERS), dense_part=[0, 1]
)
def test_shadow_mode_trains_as_stock_ddp(
    two_ranks: RankPool, exchange: str, k: int, accumulate: int, optimizer: str, dense_part: int
) -> None:
    if dense_part and optimizer == "SparseAdam":
        optimizer = "Adagrad"  # which takes both kinds of gradients
    strategy = {"shadow": True, "exchange": exchange, "workers_per_process": k}
    arguments = (optimizer, k * accumulate, bool(dense_part))
    first, other = two_ranks.run(fit_embedded, strategy, *arguments)
    assert torch.equal(first, other)
    torch.testing.assert_close(first, of_stock(two_ranks, *arguments), rtol=0, atol=1e-6)


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_one_worker_trains_as_stock_ddp(one_rank: RankPool, optimizer: str) -> None:
    (history,) = one_rank.run(fit_embedded, {}, optimizer)
    assert torch.equal(history, of_stock(one_rank, optimizer, 1, False))


def test_attacks_on_stock_ddp_and_reports_are_of_dense_rows(three_ranks: RankPool) -> None:
    callbacks = [ByzantineSimulation(SignFlip(), [1])]
    attacked = three_ranks.run(fit_embedded, None, callbacks=callbacks)[0]
    shadow = three_ranks.run(fit_embedded, {"shadow": True}, callbacks=[*callbacks, ByzantineMonitor()])[0]
    assert not torch.allclose(attacked, of_stock(three_ranks, "SGD", 1, False))
    torch.testing.assert_close(shadow, attacked, rtol=0, atol=1e-6)


def refusal(strategy: dict[str, Any]) -> str:
    with pytest.raises(MisconfigurationException) as caught:
        fit_embedded(strategy)
    return str(caught.value)


@pytest.mark.parametrize(
    "strategy", [{}, {"estimator": None, "aggregator": Krum()}, {"estimator": DoubleMomentumEstimator()}], ids=str
)
def test_rules_refuse_them(three_ranks: RankPool, strategy: dict[str, Any]) -> None:
    for error in three_ranks.run(refusal, strategy):
        assert "The gradient of the parameter 'words.weight' is sparse" in error
        assert "sparse=False" in error
