"""What differs between ranks, or bypasses the rule, before training or in it: an error on every rank that names it."""

from typing import Any
from unittest import mock

import lightning.pytorch as pl
import pytest
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.strategies import DDPStrategy
from rank_pool import RankPool
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel
from training import Regression, fit

from lightning_byzantine import ByzantineDDPStrategy


class Queue(Regression):
    """Has a buffer that grows: alike on all ranks, or more on one of them."""

    def __init__(self, sizes: dict[int, list[int]], first: dict[int, int] | None = None, **buffers: Tensor) -> None:
        super().__init__()
        self.sizes = sizes
        rank = torch.distributed.get_rank()
        self.network.register_buffer("queue", torch.zeros((first or {}).get(rank, 2)))
        for name, buffer in buffers.items():
            self.register_buffer(name, buffer)
        self.seen: list[list[float]] = []

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        self.seen.append(self.network.queue.tolist())
        loss = super().training_step(batch, batch_idx)
        sizes = self.sizes.get(self.global_rank, self.sizes[-1])
        self.network.queue = torch.full((sizes[batch_idx],), float(batch_idx + self.global_rank))
        return loss


def error_of_fit(
    model: type[pl.LightningModule], *args: Any, strategy: Any = ByzantineDDPStrategy, **options: Any
) -> Any:
    with pytest.raises((ValueError, MisconfigurationException)) as caught:
        fit(strategy(**options), model(*args), num_batches=4)
    return str(caught.value)


def test_a_buffer_that_grows_on_one_rank_is_named_on_all(three_ranks: RankPool) -> None:
    errors = three_ranks.run(error_of_fit, Queue, {1: [2, 5, 5, 5], -1: [2, 2, 2, 2]})
    expected = (
        "The buffer 'network.queue' must have the same shape and dtype on all ranks, got float32 of shape [5] on rank"
        " 1, float32 of shape [2] on ranks 0, 2."
    )
    assert all(error.startswith(expected) for error in errors)
    assert "`broadcast_buffers=False`" in errors[0]


@pytest.mark.parametrize("robust", [True, False])
def test_a_buffer_that_differs_from_the_start_is_named(three_ranks: RankPool, robust: bool) -> None:
    errors = three_ranks.run(error_of_fit, Queue, {-1: [2] * 4}, {0: 3}, robust_buffers=robust)
    assert all("got float32 of shape [3] on rank 0, float32 of shape [2] on ranks 1, 2." in error for error in errors)


def queues_of_fit(sizes: dict[int, list[int]], **options: Any) -> list[list[float]]:
    model = Queue(sizes)
    fit(ByzantineDDPStrategy(**options), model, num_batches=4)
    return model.seen


def test_a_buffer_may_grow_on_all_ranks_at_once(three_ranks: RankPool) -> None:
    for seen in three_ranks.run(queues_of_fit, {-1: [2, 3, 3, 1]}):
        assert seen == [[0.0, 0.0], [1.0, 1.0], [2.0, 2.0, 2.0], [3.0, 3.0, 3.0]]


def test_ranks_may_have_their_own_buffers(three_ranks: RankPool) -> None:
    sizes = {rank: [rank + 1] * 4 for rank in range(3)} | {-1: []}
    for rank, seen in enumerate(three_ranks.run(queues_of_fit, sizes, broadcast_buffers=False)):
        assert seen[-1] == [2.0 + rank] * (rank + 1)


class Ignored(Regression):
    """Tells DDP to leave a parameter and a buffer alone."""

    def __init__(self, name: str, frozen: bool = False) -> None:
        super().__init__()
        self.network[0].requires_grad_(not frozen)
        self.register_buffer("own", torch.zeros(torch.distributed.get_rank()))
        DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(self, [name, "own"])


def test_a_parameter_that_ddp_is_told_to_ignore_is_refused(two_ranks: RankPool) -> None:
    for error in two_ranks.run(error_of_fit, Ignored, "network.0.weight"):
        assert "The module lets DDP ignore its parameter 'network.0.weight'" in error


def fit_ignored(strategy: type[DDPStrategy]) -> Tensor:
    torch.manual_seed(3)
    return fit(strategy(broadcast_buffers=False), Ignored("network.0.weight", frozen=True))


def test_what_has_no_gradient_may_be_ignored(two_ranks: RankPool) -> None:
    ours, stock = (two_ranks.run(fit_ignored, strategy)[0] for strategy in (ByzantineDDPStrategy, DDPStrategy))
    torch.testing.assert_close(ours, stock, rtol=0, atol=1e-5)


@pytest.mark.parametrize("strategy", [DDPStrategy, ByzantineDDPStrategy])
def test_a_process_without_a_device_has_a_trainer(strategy: type[DDPStrategy]) -> None:
    with mock.patch.dict("os.environ", {"LOCAL_RANK": "1", "NODE_RANK": "0", "WORLD_SIZE": "2"}):
        assert pl.Trainer(strategy=strategy(), accelerator="cpu", devices=1, logger=False).local_rank == 1
