"""Where each rank aggregates its share of the columns, it keeps the estimator's state of these only."""

from collections.abc import Sequence
from typing import Any

import pytest
import torch
import torch.distributed as dist
from rank_pool import RankPool
from torch import Tensor, nn

from lightning_byzantine.aggregation.engine import AggregationEngine
from lightning_byzantine.aggregation.gradient_block import GradientBlock
from lightning_byzantine.aggregation.observers import Observers
from lightning_byzantine.aggregation.quarantine import Quarantine
from lightning_byzantine.aggregation.robust_aggregation import RobustAggregation
from lightning_byzantine.aggregators import CenteredClipping, PersistentFilter
from lightning_byzantine.aggregators.aggregator import Aggregator
from lightning_byzantine.estimators import WorkerMomentum
from lightning_byzantine.exchange import EXCHANGES, make_exchange

SIZES = {"weight": 41, "bias": 2, "scale": 1, "head": 130}
# As DDP first has them, and after it has rebuilt its buckets.
FIRST, LATER = [["weight", "bias", "scale", "head"]], [["head"], ["scale", "bias", "weight"]]


class Training:
    """Steps of one rank; the last one's gradients are -3 times as long in every other step."""

    def __init__(self, exchange: str, rule: Aggregator) -> None:
        self.estimator = WorkerMomentum()
        self.rule = rule
        self.engine = AggregationEngine(
            {name: nn.Parameter(torch.zeros(size)) for name, size in SIZES.items()},
            RobustAggregation(rule, 1, Quarantine(), Observers()),
            make_exchange(exchange, dist.get_world_size()),
            self.estimator,
        )

    def step(self, number: int, layout: Sequence[Sequence[str]], used: set[str] | None = None) -> Tensor:
        """Return what the optimizer receives; of unused parameters, what was there."""
        rank, lies = dist.get_rank(), dist.get_rank() == dist.get_world_size() - 1 and number % 2
        generator = torch.Generator().manual_seed(100 * number + rank)
        own = {name: (1 + torch.randn(size, generator=generator)) * (-3 if lies else 1) for name, size in SIZES.items()}
        blocks = [GradientBlock.of({name: own[name] for name in names}) for names in layout]
        for block in blocks:
            self.engine.send(block)
        self.engine.aggregate(used)
        received = {name: part for block in blocks for name, part in block.by_name(block.buffer).items()}
        return torch.cat([received.get(name, torch.full((size,), torch.nan)) for name, size in SIZES.items()])


def run(exchange: str, rule: Aggregator) -> tuple[Tensor, dict[str, Tensor], int]:
    """Return what the optimizer receives, the shared state after all steps, and how much of it this rank keeps."""
    training = Training(exchange, rule)
    received = [training.step(number, FIRST if number == 0 else LATER) for number in range(4)]
    received.append(training.step(4, LATER, used={"weight", "scale"}))
    received.append(training.step(5, FIRST))
    kept = sum(part.numel() for part in training.estimator.starts.parts.values())
    return torch.stack(received), training.estimator.shared_state(), kept


@pytest.mark.parametrize("rule", [PersistentFilter(), CenteredClipping(tau=1.0)], ids=lambda rule: type(rule).__name__)
def test_a_share_of_the_columns_is_kept_wherever_buckets_have_them(three_ranks: RankPool, rule: Aggregator) -> None:
    gathered, sharded = (three_ranks.run(run, exchange, rule) for exchange in EXCHANGES)
    assert [kept for *_, kept in gathered] == [sum(SIZES.values())] * 3
    assert sum(kept for *_, kept in sharded) == sum(SIZES.values())
    for received, state, kept in sharded:
        assert kept <= 60
        torch.testing.assert_close(received, gathered[0][0], equal_nan=True)
        torch.testing.assert_close(state, gathered[0][1])
        torch.testing.assert_close(received, sharded[0][0], rtol=0, atol=0, equal_nan=True)
        torch.testing.assert_close(state, sharded[0][1], rtol=0, atol=0)


def resume(exchange: str, layout: list[list[str]]) -> tuple[list[Tensor], list[Tensor]]:
    """Return what two steps give the optimizer, and what they give after resuming, in other buckets at first."""
    whole, resumed = (Training(exchange, PersistentFilter()) for _ in range(2))
    for number in range(3):
        whole.step(number, LATER)
    state: dict[str, Any] = {name: value.clone() for name, value in whole.estimator.shared_state().items()}
    resumed.rule.load_state_dict(whole.rule.state_dict())
    resumed.estimator.load_state([whole.estimator.worker_state()], state)
    expected = [whole.step(number, LATER) for number in (3, 4)]
    return expected, [resumed.step(3, layout), resumed.step(4, LATER)]


@pytest.mark.parametrize("exchange", EXCHANGES)
def test_goes_on_to_the_bit_in_other_buckets(three_ranks: RankPool, exchange: str) -> None:
    for expected, found in three_ranks.run(resume, exchange, FIRST):
        assert all(torch.equal(*pair) for pair in zip(expected, found, strict=True))
