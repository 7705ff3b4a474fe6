"""A plain loop with FSDP2 trains like the Trainer."""

from collections.abc import Callable
from copy import deepcopy
from typing import Any

import pytest
import torch
import torch.distributed as dist
from rank_pool import RankPool
from sharded_models import BATCH, MODELS, Sharded, data, fit_replicas, mesh_of, whole
from torch import Tensor, nn
from torch.utils.data import DataLoader, DistributedSampler

from lightning_byzantine import ByzantineBreakdownError
from lightning_byzantine.aggregators import CenteredClipping, CoordinateWiseMedian, Krum, PersistentFilter
from lightning_byzantine.attacks import SignFlip
from lightning_byzantine.hooks import FSDPHook, robust_fsdp

SHAPE = (3, 2)
NAMES = ("replicate", "shard")


class Loop:
    """Trains in a plain loop, on what Lightning would deal."""

    def __init__(self, name: str = "Sharded", shape: tuple[int, int] = SHAPE, seed: int = 1, **arguments: Any) -> None:
        torch.manual_seed(seed)
        self.module = MODELS[name]()
        self.module.log = lambda *_, **__: None  # type: ignore[method-assign]
        mesh = mesh_of(shape, NAMES)
        self.module.shard(mesh["shard"])
        self.hook: FSDPHook = robust_fsdp(self.module, mesh, **arguments)
        self.optimizer = self.module.configure_optimizers()

    def run(self, accumulate: int = 1, clip: float | None = None, steps: slice = slice(0, 10)) -> Tensor:
        """Return the parameters after each batch."""
        dataset, history = data(10), []
        batches = list(DataLoader(dataset, batch_size=BATCH, sampler=DistributedSampler(dataset, shuffle=True, seed=0)))
        for index in range(*steps.indices(len(batches))):
            (self.module.loss(batches[index], index) / accumulate).backward()
            if (index + 1) % accumulate == 0:
                self.hook.aggregate()
                if clip is not None:
                    nn.utils.clip_grad_norm_(self.module.parameters(), clip)
                self.optimizer.step()
                self.optimizer.zero_grad()
            history.append(whole(self.module))
        return torch.stack(history)


def trainer_and_loop(
    name: str, to_trainer: dict[str, Any], to_loop: dict[str, Any], **arguments: Any
) -> tuple[Tensor, Tensor]:
    return fit_replicas(SHAPE, name, **to_trainer, **arguments), Loop(name, **arguments).run(**to_loop)


@pytest.mark.parametrize(
    ("name", "arguments", "to_trainer", "to_loop"),
    [
        ("Sharded", {}, {}, {}),
        ("Sharded", {"exchange": "all_to_all", "aggregator": Krum()}, {}, {}),
        ("Unused", {"aggregator": CoordinateWiseMedian(), "estimator": None}, {}, {}),
        (
            "Tied",
            {"exchange": "all_to_all", "max_worker_grad_norm": 0.5},
            {"accumulate_grad_batches": 2, "gradient_clip_val": 0.1},
            {"accumulate": 2, "clip": 0.1},
        ),
    ],
    ids=["default", "Krum, all_to_all", "median, frozen and unused", "tied, accumulating, clipping"],
)
def test_trains_like_the_trainer(
    six_ranks: RankPool, name: str, arguments: dict[str, Any], to_trainer: dict[str, Any], to_loop: dict[str, Any]
) -> None:
    (expected, first), *others = six_ranks.run(trainer_and_loop, name, to_trainer, to_loop, **arguments)
    torch.testing.assert_close(first, expected, atol=1e-6, rtol=0)
    assert not torch.equal(first[0], first[-1])
    assert all(torch.equal(first, other) for _, other in others)


def save_and_resume() -> tuple[Tensor, Tensor]:
    loop = Loop()
    loop.run(steps=slice(0, 5))
    state = [loop.hook.state_dict()]
    dist.broadcast_object_list(state)
    # Another start, whose parameters and optimizer are those of before.
    resumed = Loop(seed=2)
    resumed.module.load_state_dict(loop.module.state_dict())
    resumed.optimizer.load_state_dict(deepcopy(loop.optimizer.state_dict()))
    resumed.hook.load_state_dict(state[0])
    return loop.run(steps=slice(5, 10)), resumed.run(steps=slice(5, 10))


def test_resume_is_exact(six_ranks: RankPool) -> None:
    for whole_run, resumed in six_ranks.run(save_and_resume):
        assert torch.equal(whole_run, resumed)


def attacked() -> tuple[Tensor, list[list[bool]]]:
    loop, trimmed = Loop(aggregator=Krum()), []
    loop.hook.add_attack(SignFlip(), workers=[1])
    loop.hook.observe(lambda report: trimmed.append(report.trimmed.tolist()))
    loop.hook.quarantine([2])
    return loop.run(), trimmed


def test_reports_attacks_and_quarantine_are_about_replicas(six_ranks: RankPool) -> None:
    for history, trimmed in six_ranks.run(attacked):
        assert history.isfinite().all()
        assert len(trimmed) == 10
        assert all(step[1] or step[2] for step in trimmed)


def starts_of(seeds: list[int]) -> Tensor:
    return whole(Loop(seed=seeds[dist.get_rank() // 2]).module)


def test_all_replicas_start_from_the_first(six_ranks: RankPool) -> None:
    first, *others = six_ranks.run(starts_of, [5, 6, 7])
    assert all(torch.equal(first, other) for other in others)


def one_bad_rank(**arguments: Any) -> Tensor:
    loop = Loop(**arguments)
    if dist.get_rank() == 2:
        loop.module.loss = lambda *batch: Sharded.loss(loop.module, *batch) * torch.nan  # type: ignore[method-assign]
    try:
        return loop.run()
    except ByzantineBreakdownError as error:
        return torch.tensor(error.workers)


def test_a_bad_rank_spoils_its_replica_only(six_ranks: RankPool) -> None:
    assert all(history.isfinite().all() for history in six_ranks.run(one_bad_rank))
    assert all(named.tolist() == [1] for named in six_ranks.run(one_bad_rank, num_byzantine=0))


def misuse(kind: str) -> str:
    mesh = mesh_of(SHAPE, NAMES)
    module = Sharded()
    wrong: dict[str, Callable[[], Any]] = {
        "not divided": lambda: robust_fsdp(nn.Linear(2, 2), mesh),
        "not a mesh": lambda: robust_fsdp(module, "replicate"),  # type: ignore[arg-type]
        "one dimension": lambda: robust_fsdp(module, mesh["shard"]),
        "whole mesh": lambda: robust_fsdp(module, mesh),
        "rule": lambda: robust_fsdp(module, mesh, aggregator=CenteredClipping(tau=0.1)),
        "f": lambda: robust_fsdp(module, mesh, aggregator=PersistentFilter(), num_byzantine=2),
    }
    module.shard(mesh if kind == "whole mesh" else mesh["shard"])
    try:
        wrong[kind]()
    except (TypeError, ValueError) as error:
        return f"{type(error).__name__}: {error}"
    return ""


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("not divided", "TypeError: module must be one that FSDP2 divides, got Linear"),
        ("not a mesh", "TypeError: mesh must be a DeviceMesh, got 'replicate'"),
        ("one dimension", "ValueError: mesh must be of all ranks in order, with two dimensions"),
        ("whole mesh", "ValueError: module must be divided among the ranks of one replica, here [0, 1]"),
        ("rule", "ValueError: aggregator must not start from the previous aggregate"),
        ("f", "ValueError: num_byzantine must satisfy 0 <= f < m / 2, got f=2 with m=3 workers"),
    ],
)
def test_refuses_with_a_clear_error(six_ranks: RankPool, kind: str, message: str) -> None:
    assert six_ranks.run(misuse, kind)[0].startswith(message)
