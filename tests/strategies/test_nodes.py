"""All ranks of a node as one worker: the mean in a node, then the rule across nodes."""

import os
import tempfile
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from rank_pool import RankPool
from torch import Tensor, nn
from training import Regression, fit, loader, parameters

from lightning_byzantine import ByzantineDDPStrategy
from lightning_byzantine.aggregators import Aggregator, CenteredClipping, CoordinateWiseMedian, Krum, Mean
from lightning_byzantine.attacks import NonFinite, SignFlip
from lightning_byzantine.callbacks import ByzantineMonitor, ByzantineSimulation
from lightning_byzantine.monitoring import Suspect
from lightning_byzantine.optim import DoubleMomentum, DoubleMomentumEstimator

RANKS_PER_NODE = 2


def fit_nodes(model: Any = None, callbacks: tuple[Any, ...] = (), of_trainer: Any = None, **arguments: Any) -> Tensor:
    """Train with every two ranks as one node; return the parameters after each batch."""
    rank, num_ranks = torch.distributed.get_rank(), torch.distributed.get_world_size()
    node, local = divmod(rank, RANKS_PER_NODE)
    environment = mock.patch.dict(os.environ, {"NODE_RANK": str(node), "LOCAL_RANK": str(local)})
    with environment, tempfile.TemporaryDirectory() as folder:
        return fit(
            ByzantineDDPStrategy(workers="node", **arguments),
            model,
            default_root_dir=folder,
            devices=RANKS_PER_NODE,
            num_nodes=num_ranks // RANKS_PER_NODE,
            callbacks=list(callbacks),
            **(of_trainer or {}),
        )


def by_hand(rule: Aggregator, num_byzantine: int, num_ranks: int, max_norm: float | None) -> Tensor:
    """Return the same from one process that computes all ranks' gradients: their means in nodes, then the rule."""
    torch.manual_seed(1)
    model = Regression()
    steps, history = model.configure_optimizers(), []
    loss_of = nn.functional.mse_loss
    for batches in zip(*batches_of_ranks(num_ranks), strict=True):
        rows = []
        for inputs, targets in batches:
            steps.zero_grad()
            loss_of(model(inputs), targets).backward()
            rows.append(torch.cat([parameter.grad.flatten() for parameter in model.parameters()]))
        nodes = torch.stack(rows).view(-1, RANKS_PER_NODE, len(rows[0])).mean(dim=1)
        if max_norm is not None:
            nodes *= (max_norm / nodes.norm(dim=1, keepdim=True)).clamp(max=1)
        aggregate = rule(nodes, num_byzantine=num_byzantine)
        sizes = [parameter.numel() for parameter in model.parameters()]
        for parameter, part in zip(model.parameters(), torch.split(aggregate, sizes), strict=True):
            parameter.grad = part.view_as(parameter)
        steps.step()
        history.append(parameters(model))
    return torch.stack(history)


def batches_of_ranks(num_ranks: int) -> list[list[list[Tensor]]]:
    """Return what Lightning deals to each rank."""
    dataset = loader().dataset
    samplers = [
        torch.utils.data.DistributedSampler(dataset, num_ranks, rank, shuffle=True) for rank in range(num_ranks)
    ]
    return [list(torch.utils.data.DataLoader(dataset, 4, sampler=sampler)) for sampler in samplers]


def compare_by_hand(rule: Aggregator, exchange: str, estimator: Any, max_norm: float | None = None) -> Tensor:
    num_ranks = torch.distributed.get_world_size()
    arguments = {"aggregator": rule, "exchange": exchange, "estimator": estimator, "bucket_cap_mb": 0.0005}
    history = fit_nodes(max_worker_grad_norm=max_norm, **arguments)
    num_byzantine = (num_ranks // RANKS_PER_NODE - 1) // 2
    torch.testing.assert_close(history, by_hand(rule, num_byzantine, num_ranks, max_norm), rtol=1e-6, atol=1e-6)
    return history


@pytest.mark.parametrize("exchange", ["all_gather", "all_to_all"])
def test_two_nodes_of_two_ranks(four_ranks: RankPool, exchange: str) -> None:
    # Momentum changes nothing under the mean.
    for estimator in (None, "auto"):
        first, *others = four_ranks.run(compare_by_hand, Mean(), exchange, estimator)
        assert all(torch.equal(first, other) for other in others)


@pytest.mark.parametrize(
    ("rule", "exchange"),
    [
        (CoordinateWiseMedian(), "all_gather"),
        (Krum(), "all_to_all"),
        pytest.param(CoordinateWiseMedian(), "all_to_all", marks=pytest.mark.slow),
        pytest.param(Krum(), "all_gather", marks=pytest.mark.slow),
    ],
    ids=str,
)
def test_the_rule_decides_among_means_of_nodes(six_ranks: RankPool, rule: Aggregator, exchange: str) -> None:
    first, *others = six_ranks.run(compare_by_hand, rule, exchange, None, max_norm=0.5)
    assert all(torch.equal(first, other) for other in others)


def fit_and_name(**arguments: Any) -> tuple[Tensor, list[str]]:
    suspects: list[Suspect] = []
    monitor = ByzantineMonitor(on_suspect=suspects.append, audit=None)
    history = fit_nodes(callbacks=(ByzantineSimulation(NonFinite(), workers=[1]), monitor), **arguments)
    return history, [str(suspect) for suspect in suspects]


def test_a_bad_node_is_left_out_and_named_with_its_ranks(six_ranks: RankPool) -> None:
    for history, named in six_ranks.run(fit_and_name):
        assert history.isfinite().all()
        assert named[0].startswith("worker 1 (ranks 2-3, host ")


class OneBadRank(Regression):
    """On rank 2, all losses are NaN, and with them the gradient of its node; and all buffers."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("statistic", torch.zeros(3))

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        is_bad = self.global_rank == 2
        self.statistic += torch.nan if is_bad else 1
        inputs, targets = batch
        return nn.functional.mse_loss(self(inputs), targets) * (torch.nan if is_bad else 1)


def fit_with_one_bad_rank() -> tuple[Tensor, Tensor, list[int]]:
    model, monitor = OneBadRank(), ByzantineMonitor(audit=None)
    return fit_nodes(model, callbacks=(monitor,)), model.statistic, monitor.suspects


def test_one_bad_rank_spoils_its_node_only(six_ranks: RankPool) -> None:
    for history, statistic, suspects in six_ranks.run(fit_with_one_bad_rank):
        assert history.isfinite().all()
        assert not torch.equal(history[0], history[-1])
        assert statistic.tolist() == [10.0] * 3
        assert suspects == [1]


def fit_and_save(folder: Path, exchange: str, ckpt_path: Path | None = None) -> Tensor:
    checkpoint = ModelCheckpoint(folder, filename="{step}", every_n_train_steps=5, save_top_k=-1)
    attack = ByzantineSimulation(SignFlip(), workers=[1])
    of_trainer = {"enable_checkpointing": True, "ckpt_path": ckpt_path, "max_epochs": 2}
    return fit_nodes(callbacks=(attack, checkpoint), of_trainer=of_trainer, exchange=exchange)


@pytest.mark.parametrize("exchange", [pytest.param("all_gather", marks=pytest.mark.slow), "all_to_all"])
def test_resume_is_exact(six_ranks: RankPool, tmp_path: Path, exchange: str) -> None:
    whole = six_ranks.run(fit_and_save, tmp_path / "whole", exchange)[0]
    # Between two epochs, since plain loaders start over.
    resumed = six_ranks.run(fit_and_save, tmp_path / "resumed", exchange, tmp_path / "whole" / "step=10.ckpt")
    assert all(torch.equal(whole[10:], one) for one in resumed)


def error_of(wraps: bool = False, callbacks: tuple[Any, ...] = ()) -> str:
    try:
        fit_nodes(DoubleMomentumRegression() if wraps else None, callbacks)
    except MisconfigurationException as error:
        return str(error)
    return ""


class DoubleMomentumRegression(Regression):
    def configure_optimizers(self) -> Any:
        return DoubleMomentum(torch.optim.SGD(self.parameters(), lr=0.1), weighted=False)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"workers_per_process": 2}, "`workers_per_process`, which makes several workers of a process, got"),
        ({"shadow": True}, "`shadow`, which averages over all ranks at once"),
        ({"check_consistency_every_n_steps": 5}, "`check_consistency_every_n_steps`, which compares momentum"),
        ({"aggregator": CenteredClipping(tau=0.1)}, "a rule that starts from the previous aggregate"),
        ({"estimator": DoubleMomentumEstimator()}, "double momentum, whose second gradient"),
    ],
)
def test_refuses_what_does_not_go_with_it(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(MisconfigurationException, match=message):
        ByzantineDDPStrategy(workers="node", **arguments)


def test_refuses_double_momentum_of_the_module(six_ranks: RankPool) -> None:
    assert all("can't go with double momentum" in error for error in six_ranks.run(error_of, wraps=True))


def test_refuses_a_single_node_and_unknown_workers() -> None:
    with pytest.raises(MisconfigurationException, match="can't outvote itself, got num_nodes=1"):
        Trainer(strategy=ByzantineDDPStrategy(workers="node"), accelerator="cpu", devices=2, logger=False)
    with pytest.raises(ValueError, match="workers must be one of"):
        ByzantineDDPStrategy(workers="host")  # type: ignore[arg-type]


def test_refuses_audits(six_ranks: RankPool) -> None:
    errors = six_ranks.run(error_of, callbacks=(ByzantineMonitor(audit="all"),))
    assert all("which needs workers='rank'" in error for error in errors)
