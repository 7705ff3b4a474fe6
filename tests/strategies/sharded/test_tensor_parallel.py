"""Replicas whose layers are divided by tensor parallelism, with and without FSDP2."""

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from rank_pool import RankPool
from sharded_models import BATCH, Sharded, data, train, whole
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module
from torch.utils.data import DataLoader, DistributedSampler

from lightning_byzantine import ByzantineModelParallelStrategy
from lightning_byzantine.aggregators import Mean


class TensorParallel(Sharded):
    """Two layers divided by rows and columns, and a normalization that each rank of a group has."""

    def __init__(self) -> None:
        super().__init__()
        self.network = nn.Sequential(nn.Linear(8, 6), nn.Tanh(), nn.Linear(6, 4), nn.LayerNorm(4), nn.Linear(4, 1))

    def configure_model(self) -> None:
        plan = {"0": ColwiseParallel(), "2": RowwiseParallel()}
        parallelize_module(self.network, self.device_mesh["tensor_parallel"], plan)
        if self.device_mesh["data_parallel"].size() > 1:
            fully_shard(self, mesh=self.device_mesh["data_parallel"])


def fit_tensor_parallel(shape: tuple[int, int, int], **arguments: Any) -> Tensor:
    torch.manual_seed(1)
    strategy = ByzantineModelParallelStrategy(*shape, aggregator=Mean(), **arguments)
    return train(strategy, TensorParallel(), data(5, shape[0] * shape[1]), num_steps=5)


def fit_whole(num_groups: int) -> Tensor:
    """Train on the batches of all groups together, in this process."""
    torch.manual_seed(1)
    model, dataset = TensorParallel(), data(5, num_groups)
    optimizer = model.configure_optimizers()
    samplers = [DistributedSampler(dataset, num_groups, rank, seed=0) for rank in range(num_groups)]
    loaders = [DataLoader(dataset, batch_size=BATCH, sampler=sampler) for sampler in samplers]
    history = []
    for batches in zip(*loaders, strict=True):
        optimizer.zero_grad()
        for batch in batches:
            (model.loss(batch, 0) / num_groups).backward()
        optimizer.step()
        history.append(whole(model))
    return torch.stack(history)


@pytest.mark.parametrize(("exchange", "estimator"), [("all_gather", None), ("all_to_all", "auto")])
def test_trains_as_one_process_would(four_ranks: RankPool, exchange: str, estimator: Any) -> None:
    first, *others = four_ranks.run(fit_tensor_parallel, (2, 1, 2), exchange=exchange, estimator=estimator)
    assert all(torch.equal(first, other) for other in others)
    torch.testing.assert_close(first, fit_whole(2), atol=1e-5, rtol=0)


@pytest.fixture(scope="module")
def eight_ranks() -> Iterator[RankPool]:
    pool = RankPool(8)
    yield pool
    pool.close()


@pytest.mark.slow
@pytest.mark.parametrize("exchange", ["all_gather", "all_to_all"])
def test_fsdp_and_tensor_parallelism_together(eight_ranks: RankPool, exchange: str) -> None:
    first, *others = eight_ranks.run(fit_tensor_parallel, (2, 2, 2), exchange=exchange)
    assert all(torch.equal(first, other) for other in others)
    torch.testing.assert_close(first, fit_whole(4), atol=1e-5, rtol=0)
