"""Rules choose the same workers as where each rank has whole vectors, and all ranks the same."""

from copy import deepcopy

import pytest
import torch
from cases import name_of
from rank_pool import RankPool
from sharded_models import mesh_of
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, Shard, distribute_tensor

from lightning_byzantine.aggregation.engine import AggregationEngine
from lightning_byzantine.aggregation.observers import Observers
from lightning_byzantine.aggregation.quarantine import Quarantine
from lightning_byzantine.aggregation.robust_aggregation import RobustAggregation
from lightning_byzantine.aggregation.shard_layout import ShardLayout
from lightning_byzantine.aggregation.sharded_gradients import ShardedGradients
from lightning_byzantine.aggregators import (
    CAF,
    CTMA,
    NNM,
    SMEA,
    Aggregator,
    Bucketing,
    CoordinateWiseMedian,
    GeometricMedian,
    Krum,
    MinimumDiameterAveraging,
    MoNNA,
    MultiKrum,
    PerLayer,
    PersistentFilter,
    Report,
)
from lightning_byzantine.exchange import Shards, make_exchange
from lightning_byzantine.matrix import Segments, WorkerMatrix

SHAPES = {"first": (33, 7), "bias": (3,), "second": (1, 150), "scale": (1,), "third": (20, 11)}
SIZES = {name: torch.Size(shape).numel() for name, shape in SHAPES.items()}
STEPS, NUM_WORKERS = 3, 3

RULES: list[Aggregator] = [
    PersistentFilter(),
    PerLayer(Krum()),
    Krum(),
    MultiKrum(),
    CTMA(CoordinateWiseMedian()),
    CTMA(NNM(GeometricMedian())),
    MinimumDiameterAveraging(),
    MoNNA(),
    CAF(),
    SMEA(),
    Bucketing(GeometricMedian(), bucket_size=1),
]


def vectors(offset: float) -> Tensor:
    """Return all workers' gradients, [steps, m, d], far from 0, of which the last worker's differs in one layer."""
    found = torch.randn(STEPS, NUM_WORKERS, sum(SIZES.values()), generator=torch.Generator().manual_seed(5)) + offset
    found[:, -1, : SIZES["first"]] += 0.5
    return found


def choose_in_parts(rule: Aggregator, exchange: str, offset: float) -> tuple[list[Report], Tensor]:
    """Return the reports and the results, [steps, d], of 3 replicas of 2 ranks."""
    mesh = mesh_of((NUM_WORKERS, 2), ("across", "within"))
    shards = Shards(mesh.get_group("across"), mesh.get_group("within"))
    own = mesh["within"]
    parameters = {
        name: nn.Parameter(distribute_tensor(torch.zeros(shape), own, [Shard(0)], src_data_rank=None))
        for name, shape in SHAPES.items()
    }
    observers, reports, results = Observers(), [], []
    observers.add(reports.append)
    engine = AggregationEngine(
        parameters,
        RobustAggregation(rule, 1, Quarantine(), observers),
        make_exchange(exchange, NUM_WORKERS, None, shards),
    )
    gradients = ShardedGradients(engine, ShardLayout(parameters, {}))
    for rows in vectors(offset):
        vector = rows[mesh.get_local_rank("across")]
        for (name, parameter), part in zip(parameters.items(), vector.split(list(SIZES.values())), strict=True):
            whole = part.clone().view(SHAPES[name])
            parameter.grad = distribute_tensor(whole, own, [Shard(0)], src_data_rank=None)
        gradients.aggregate()
        wholes = []
        for parameter in parameters.values():
            assert isinstance(parameter.grad, DTensor)
            wholes.append(parameter.grad.full_tensor().flatten())
        results.append(torch.cat(wholes))
    return reports, torch.stack(results)


def choose_whole(rule: Aggregator, offset: float) -> tuple[list[Report], Tensor]:
    observers, reports, results = Observers(), [], []
    observers.add(reports.append)
    aggregation = RobustAggregation(rule, 1, Quarantine(), observers)
    segments = Segments.of_blocks(SIZES, [(tuple(SIZES), list(SIZES.values()))])
    for rows in vectors(offset):
        results.append(aggregation.aggregate(WorkerMatrix([rows], segments=segments)).parts[0])
        aggregation.announce()
    return reports, torch.stack(results)


@pytest.mark.parametrize("exchange", ["all_gather", "all_to_all"])
@pytest.mark.parametrize("rule", RULES, ids=name_of)
def test_chooses_the_same_workers(six_ranks: RankPool, rule: Aggregator, exchange: str) -> None:
    for offset in (0.0, 1000.0):
        expected, result = choose_whole(deepcopy(rule), offset)
        for reports, results in (found := six_ranks.run(choose_in_parts, rule, exchange, offset)):
            assert torch.equal(results, found[0][1])
            torch.testing.assert_close(results, result, atol=1e-6 * max(1, offset), rtol=1e-5)
            for report, same in zip(reports, expected, strict=True):
                assert torch.equal(report.trimmed, same.trimmed)
                torch.testing.assert_close(report.weights, same.weights, equal_nan=True, atol=1e-5, rtol=0)
