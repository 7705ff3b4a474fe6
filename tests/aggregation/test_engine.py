"""The engine, driven as DDP's hook drives it, but with neither DDP nor Lightning."""

from collections.abc import Mapping

import numpy as np
import pytest
import torch
from cases import name_of
from oracles import krum, limited
from rank_pool import RankPool
from torch import Tensor, nn

from lightning_byzantine import ByzantineBreakdownError
from lightning_byzantine.aggregation.breakdown import Breakdown
from lightning_byzantine.aggregation.engine import AggregationEngine
from lightning_byzantine.aggregation.gradient_block import GradientBlock
from lightning_byzantine.aggregation.observers import Observers
from lightning_byzantine.aggregation.quarantine import Quarantine
from lightning_byzantine.aggregation.robust_aggregation import RobustAggregation
from lightning_byzantine.aggregators import (
    CTMA,
    Aggregator,
    CenteredClipping,
    CoordinateWiseMedian,
    Krum,
    Mean,
    MultiKrum,
    PerLayer,
    PersistentFilter,
    Report,
)
from lightning_byzantine.estimators import WorkerMomentum
from lightning_byzantine.estimators.estimator import Scale
from lightning_byzantine.exchange import SingleRank, make_exchange
from lightning_byzantine.matrix import WorkerMatrix

SIZES = {"weight": 6, "bias": 3, "scale": 1}
STEPS = 4


def gradients(seed: int, steps: int = STEPS) -> Tensor:
    """Return all workers' gradients, [steps, m, d]."""
    return torch.randn(steps, 3, sum(SIZES.values()), generator=torch.Generator().manual_seed(seed))


def drive(
    rule: Aggregator,
    exchange: str = "all_gather",
    estimator: WorkerMomentum | None = None,
    faulty: tuple[int, int] | None = None,
    quarantined: tuple[int, ...] = (),
    policy: str = "raise",
    max_norm: float | None = None,
    steps: int = STEPS,
) -> tuple[Tensor, list[list[bool]], list[str]]:
    """Return what the optimizer receives, [steps, d], who was trimmed in each step, and the errors of skipped steps."""
    num_ranks, rank = torch.distributed.get_world_size(), torch.distributed.get_rank()
    observers, quarantine, skipped = Observers(), Quarantine(), []
    if quarantined:
        quarantine.add(quarantined, rule, num_ranks, 1)
    reports: list[Report] = []
    observers.add(reports.append)
    engine = AggregationEngine(
        {name: nn.Parameter(torch.zeros(size)) for name, size in SIZES.items()},
        RobustAggregation(rule, 1, quarantine, observers),
        make_exchange(exchange, num_ranks),
        estimator,
        max_norm=max_norm,
        breakdown=Breakdown(policy),
        on_skip=lambda error: skipped.append(str(error)),
    )
    received = []
    for step, workers in enumerate(gradients(seed=0, steps=steps)):
        own = workers[rank].clone()
        if faulty == (step, rank) or (faulty is not None and faulty == (step, -1) and rank > 0):
            own[2] = torch.nan
        weight, bias, scale = own.split(list(SIZES.values()))
        blocks = [GradientBlock.of({"weight": weight}), GradientBlock.of({"bias": bias, "scale": scale})]
        for block in blocks:
            engine.send(block)
        engine.aggregate()
        received.append(torch.cat([block.buffer for block in blocks]))
    return torch.stack(received), [report.trimmed.tolist() for report in reports], skipped


@pytest.mark.parametrize("exchange", ["all_gather", "all_to_all"])
def test_the_mean_under_transparent_momentum_is_the_mean(three_ranks: RankPool, exchange: str) -> None:
    for received, *_ in three_ranks.run(drive, Mean(), exchange, WorkerMomentum()):
        torch.testing.assert_close(received, gradients(seed=0).mean(1))


@pytest.mark.parametrize("exchange", ["all_gather", "all_to_all"])
@pytest.mark.parametrize("rule", [CoordinateWiseMedian(), Krum()], ids=repr)
def test_the_rule_sees_whole_vectors(three_ranks: RankPool, rule: Aggregator, exchange: str) -> None:
    expected = torch.stack([rule(vectors, num_byzantine=1) for vectors in gradients(seed=0)])
    for received, *_ in three_ranks.run(drive, rule, exchange):
        torch.testing.assert_close(received, expected)


def test_workers_are_clipped_each_on_its_own(three_ranks: RankPool) -> None:
    vectors = gradients(seed=0)
    expected = (vectors * (1.0 / vectors.norm(dim=2, keepdim=True)).clamp(max=1)).mean(1)
    for received, *_ in three_ranks.run(drive, Mean(), max_norm=1.0):
        torch.testing.assert_close(received, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("exchange", ["all_gather", "all_to_all"])
def test_a_rule_starts_from_what_was_aggregated_last(three_ranks: RankPool, exchange: str) -> None:
    rule = CenteredClipping(tau=0.5)
    expected = torch.stack([rule(vectors, num_byzantine=1) for vectors in gradients(seed=0)])
    for received, *_ in three_ranks.run(drive, CenteredClipping(tau=0.5), exchange):
        torch.testing.assert_close(received, expected)


def test_a_worker_that_sends_nan_is_dropped_and_keeps_its_momentum(three_ranks: RankPool) -> None:
    vectors = gradients(seed=0)
    momentum, expected = torch.zeros(3, vectors.shape[2]), []
    for step, workers in enumerate(vectors):
        sent = 0.9 * momentum + 0.1 * workers
        usable = torch.tensor([0, 1] if step == 1 else [0, 1, 2])
        expected.append(CoordinateWiseMedian()(sent[usable], num_byzantine=0 if step == 1 else 1))
        momentum[usable] = sent[usable]
    estimator = WorkerMomentum(transparent=True)
    for received, trimmed, _ in three_ranks.run(drive, CoordinateWiseMedian(), "all_gather", estimator, faulty=(1, 2)):
        for step, aggregate in enumerate(expected):
            before = expected[step - 1] if step else torch.zeros_like(aggregate)
            torch.testing.assert_close(received[step], (aggregate - 0.9 * before) / 0.1, rtol=1e-4, atol=1e-5)
        assert trimmed[1] == [False, False, True]


@pytest.mark.parametrize("exchange", ["all_gather", "all_to_all"])
def test_steps_of_momentum_are_no_longer_than_honest_gradients_explain(three_ranks: RankPool, exchange: str) -> None:
    momentum, sent, aggregates, scales = torch.zeros(3, 10, dtype=torch.float64), [], [], []
    for workers in gradients(seed=0, steps=20):
        momentum = 0.9 * momentum + 0.1 * workers
        sent.append(momentum.numpy())
        aggregates.append(krum(list(momentum.numpy()), f=1))
        distances, length = (momentum - torch.from_numpy(aggregates[-1])).norm(dim=1), momentum.norm(dim=1).median()
        scales.append(Scale(float(length.bfloat16()), float(min(distances.max(), length).bfloat16())))
    expected, *_ = limited(aggregates, scales, beta=0.9, sent=sent)
    unlimited, *_ = limited(aggregates, [None] * 20, beta=0.9)
    assert not np.allclose(expected, unlimited)
    for received, *_ in three_ranks.run(drive, Krum(), exchange, WorkerMomentum(), steps=20):
        torch.testing.assert_close(received.double(), torch.from_numpy(np.array(expected)), rtol=5e-3, atol=1e-5)


# The bias belongs to the weight before it. "late" is used in the second step only.
LAYERS = {"weight": 120, "bias": 4, "head": 200, "late": 130}


def drive_layers(rule: Aggregator, exchange: str, dtypes: list[torch.dtype]) -> list[dict[str, Tensor]]:
    """Return what the optimizer receives in each of three steps, by parameter."""
    num_ranks, rank, received = torch.distributed.get_world_size(), torch.distributed.get_rank(), []
    engine = AggregationEngine(
        {name: nn.Parameter(torch.zeros(size)) for name, size in LAYERS.items()},
        RobustAggregation(rule, 1, Quarantine(), Observers()),
        make_exchange(exchange, num_ranks),
    )
    for step, vectors in enumerate(rows_of_layers()):
        own = dict(zip(LAYERS, vectors[rank].clone().split(list(LAYERS.values())), strict=True))
        used = set(LAYERS) - ({"late"} if step != 1 else set())
        layouts = [["late", "head"], ["bias", "weight"]]  # as DDP has it
        blocks = [
            GradientBlock.of({name: own[name].to(dtype) for name in names})
            for names, dtype in zip(layouts, dtypes, strict=True)
        ]
        for block in blocks:
            engine.send(block)
        engine.aggregate(used)
        parts = {name: part for block in blocks for name, part in block.by_name(block.buffer).items()}
        received.append({name: part.double() for name, part in parts.items()})
    return received


def rows_of_layers() -> Tensor:
    vectors = torch.randn(3, 3, sum(LAYERS.values()), generator=torch.Generator().manual_seed(0))
    vectors[:, :, 124:] = vectors[:, :, 124:].flip(1) * torch.linspace(1, 2, 330)  # another worker amid the others
    return vectors


@pytest.mark.parametrize("dtypes", [[torch.float32] * 2, [torch.float64, torch.float32]], ids=str)
@pytest.mark.parametrize("rule", [PerLayer(Krum()), CTMA(PerLayer(MultiKrum())), PersistentFilter()], ids=name_of)
def test_layers_are_decided_on_alike_in_both_exchanges(
    three_ranks: RankPool, rule: Aggregator, dtypes: list[torch.dtype]
) -> None:
    gathered, sharded = (
        three_ranks.run(drive_layers, rule, exchange, dtypes) for exchange in ("all_gather", "all_to_all")
    )
    for results in (gathered, sharded):
        for step, (vectors, received) in enumerate(zip(rows_of_layers(), results[0], strict=True)):
            assert all(
                torch.equal(result[step][name], values) for result in results for name, values in received.items()
            )
            assert received.keys() == (LAYERS.keys() if step == 1 else LAYERS.keys() - {"late"})
            if rule.__class__ is PerLayer:
                groups = [vectors[:, :124], vectors[:, 124:324], vectors[:, 324:]]
                expected = torch.cat([Krum()(group, num_byzantine=1) for group in groups]).double()
                found = torch.cat([received[name] for name in LAYERS if name in received])
                assert torch.equal(found, expected[: len(found)])
    # Weights that are computed depend on the order of sums in their last digits; rows that are selected don't.
    tolerance = 1e-5 if isinstance(rule, PersistentFilter) else 0
    for one, other in zip(gathered[0], sharded[0], strict=True):
        for name, values in one.items():
            torch.testing.assert_close(other[name], values, rtol=0, atol=tolerance)


def test_quarantine_drops_rows_before_the_rule(three_ranks: RankPool) -> None:
    expected = gradients(seed=0)[:, [0, 2]].mean(1)
    for received, trimmed, _ in three_ranks.run(drive, Mean(), quarantined=(1,)):
        torch.testing.assert_close(received, expected)
        assert trimmed[0] == [False, True, False]


def test_a_skipped_step_is_nan_and_says_why(three_ranks: RankPool) -> None:
    for received, _, skipped in three_ranks.run(drive, CoordinateWiseMedian(), faulty=(1, -1), policy="skip"):
        assert received[1].isnan().all() and received[[0, 2, 3]].isfinite().all()
        assert skipped == ["2 of 3 workers sent a non-finite or overflowing vector (workers 1, 2), but num_byzantine=1"]


def error_of_drive() -> list[int]:
    with pytest.raises(ByzantineBreakdownError) as caught:
        drive(CoordinateWiseMedian(), faulty=(1, -1))
    return caught.value.workers


def test_a_breakdown_names_the_workers_on_all_ranks(three_ranks: RankPool) -> None:
    assert three_ranks.run(error_of_drive) == [[1, 2]] * 3


def test_plain_mean_takes_over_where_breakdowns_propagate(three_ranks: RankPool) -> None:
    for received, *_ in three_ranks.run(drive, CoordinateWiseMedian(), faulty=(1, -1), policy="propagate"):
        assert received[1, 2].isnan()
        torch.testing.assert_close(received[1, 3:], gradients(seed=0)[1, :, 3:].mean(0))


def previous_that_an_attack_sees(exchange: str) -> list[Tensor | None]:
    """Return what was aggregated last, as simulated attacks see it in each step, this rank's columns of it."""
    num_ranks, rank, seen = torch.distributed.get_world_size(), torch.distributed.get_rank(), []
    rule = CenteredClipping(tau=0.5)
    engine = AggregationEngine(
        {"weight": nn.Parameter(torch.zeros(6))},
        RobustAggregation(rule, 1, Quarantine(), Observers()),
        make_exchange(exchange, num_ranks),
    )

    def attack(matrix: WorkerMatrix) -> WorkerMatrix:
        seen.append(None if matrix.previous is None else matrix.previous[0].clone())
        return matrix.map_blocks(torch.neg)

    engine.add_attack(attack)
    for workers in gradients(seed=0, steps=2):
        block = GradientBlock.of({"weight": workers[rank][:6].clone()})
        engine.send(block)
        engine.aggregate()
    return seen


@pytest.mark.parametrize("exchange", ["all_gather", "all_to_all"])
def test_attacks_know_what_the_rule_starts_from(three_ranks: RankPool, exchange: str) -> None:
    expected = CenteredClipping(tau=0.5)(-gradients(seed=0)[0, :, :6], num_byzantine=1)
    shards = [expected] * 3 if exchange == "all_gather" else expected.split(2)
    for (first, second), shard in zip(three_ranks.run(previous_that_an_attack_sees, exchange), shards, strict=True):
        assert first is None
        torch.testing.assert_close(second, shard)


def test_an_observer_may_end_itself() -> None:
    observers, calls = Observers(), []

    def once(report: Report) -> None:
        calls.append(report)
        handle.remove()

    handle = observers.add(once)
    observers.add(calls.append)
    for _ in range(2):
        observers.tell(lambda: Report.of_breakdown([0], num_workers=3))
    assert len(calls) == 3


def drive_partly_used(exchange: str, max_norm: float | None) -> tuple[Tensor, Tensor, list[list[float]]]:
    """Return what three steps leave in the buffer, a worker's momentum after each, and the distances reported.

    In the second step, nobody uses the bias, and only rank 0 the scale, of which the others have no gradient.
    """
    num_ranks, rank = torch.distributed.get_world_size(), torch.distributed.get_rank()
    observers, reports = Observers(), []
    observers.add(lambda report: reports.append(report.distances.tolist()))
    estimator = WorkerMomentum()
    engine = AggregationEngine(
        {name: nn.Parameter(torch.zeros(size)) for name, size in SIZES.items()},
        RobustAggregation(CTMA(CoordinateWiseMedian()), 1, Quarantine(), observers),
        make_exchange(exchange, num_ranks),
        estimator,
        max_norm=max_norm,
    )
    received, momenta = [], []
    for step, workers in enumerate(gradients(seed=0, steps=3)):
        own = dict(zip(SIZES, workers[rank].clone().split(list(SIZES.values())), strict=True))
        used = set(SIZES)
        if step == 1:
            own["bias"][:] = torch.nan  # left by an earlier step
            used = {"weight", "scale"} if rank == 0 else {"weight"}
            own["scale"] *= rank == 0
        block = GradientBlock.of(own)
        engine.send(block)
        engine.aggregate(used)
        received.append(block.buffer)
        momenta.append(torch.cat([estimator.worker_state()[name] for name in SIZES]))
    return torch.stack(received), torch.stack(momenta), reports


@pytest.mark.parametrize("max_norm", [None, 1e6])
@pytest.mark.parametrize("exchange", ["all_gather", "all_to_all"])
def test_a_parameter_takes_part_if_any_rank_has_used_it(
    three_ranks: RankPool, exchange: str, max_norm: float | None
) -> None:
    sent, momentum = gradients(seed=0, steps=3), torch.zeros(3, 10)
    sent[1, 1:, 9] = 0
    bias, expected, before = slice(6, 9), [], torch.zeros(10)
    for step, workers in enumerate(sent):
        moved = 0.9 * momentum + 0.1 * workers
        seen = moved if step != 1 else moved.index_fill(1, torch.arange(6, 9), 0)
        aggregate = CTMA(CoordinateWiseMedian())(seen, num_byzantine=1)
        distances = (seen - CoordinateWiseMedian()(seen, num_byzantine=1)).norm(dim=1)
        if step == 1:
            moved[:, bias], aggregate[bias] = momentum[:, bias], before[bias]
        expected.append(((aggregate - 0.9 * before) / 0.1, moved, distances))
        momentum, before = moved, aggregate
    for rank, (received, momenta, reports) in enumerate(three_ranks.run(drive_partly_used, exchange, max_norm)):
        for step, (gradient, moved, distances) in enumerate(expected):
            if step == 1:
                assert received[1, bias].isnan().all()  # as it was
                gradient[bias] = torch.nan
            torch.testing.assert_close(received[step], gradient, rtol=1e-4, atol=1e-5, equal_nan=True)
            torch.testing.assert_close(momenta[step], moved[rank])
            torch.testing.assert_close(reports[step], distances.tolist(), rtol=1e-4, atol=1e-5)


def test_nothing_sent_is_an_error() -> None:
    engine = AggregationEngine(
        {}, RobustAggregation(Mean(), 0, Quarantine(), Observers()), make_exchange("all_gather", 1)
    )
    with pytest.raises(RuntimeError, match="aggregate needs the step's gradients, got none"):
        engine.aggregate()


def test_a_rule_in_training_can_be_called_on_plain_vectors(one_rank: RankPool) -> None:
    expected, disturbed = (one_rank.run(drive_alone, call_it_too)[0] for call_it_too in (False, True))
    assert torch.equal(disturbed, expected)


def drive_alone(call_it_too: bool) -> Tensor:
    rule = CenteredClipping(tau=0.5)
    engine = AggregationEngine(
        {"weight": nn.Parameter(torch.zeros(6))},
        RobustAggregation(rule, 0, Quarantine(), Observers()),
        make_exchange("all_gather", 1),
    )
    for workers in gradients(seed=0):
        if call_it_too:
            rule(torch.ones(3, 4), num_byzantine=1)
        block = GradientBlock.of({"weight": workers[0][:6].clone()})
        engine.send(block)
        engine.aggregate()
    return block.buffer


class Counting(WorkerMomentum):
    """Counts what is committed."""

    def __init__(self) -> None:
        super().__init__()
        self.num_commits = 0

    def commit(self, sent: Mapping[str, Tensor], worker: int = 0) -> None:
        self.num_commits += 1
        super().commit(sent, worker)


def trained(estimator: WorkerMomentum, own: list[Tensor], used: list[set[str] | None]) -> list[dict[str, Tensor]]:
    """Return the state after each step, as it was then, of a single worker that sends some gradients."""
    aggregation = RobustAggregation(Mean(), 0, Quarantine(), Observers())
    parameters = {name: nn.Parameter(torch.zeros(size)) for name, size in SIZES.items()}
    engine = AggregationEngine(parameters, aggregation, SingleRank(), estimator, breakdown=Breakdown("skip"))
    states = []
    for gradient, names in zip(own, used, strict=True):
        parts = gradient.clone().split(list(SIZES.values()))
        engine.send(GradientBlock.of(dict(zip(SIZES, parts, strict=True))))
        engine.aggregate(names)
        states.append(estimator.worker_state())
    return states


def test_what_was_sent_is_the_momentum_whatever_happens_in_later_steps() -> None:
    own = list(gradients(seed=1, steps=8)[:, 0])
    own[3][2], own[4][7] = torch.nan, torch.inf
    used = [None, None, {"weight", "scale"}, None, None, {"bias"}, None, None]
    expected, states = dict.fromkeys(SIZES, torch.zeros(1)), trained(WorkerMomentum(), own, used)
    for gradient, names, state in zip(own, used, states, strict=True):
        for name, part in zip(SIZES, gradient.split(list(SIZES.values())), strict=True):
            if gradient.isfinite().all() and (names is None or name in names):
                expected[name] = 0.9 * expected[name] + 0.1 * part
            torch.testing.assert_close(state[name], expected[name].expand_as(part))


def test_an_estimator_that_commits_in_its_own_way_is_asked_to() -> None:
    estimator = Counting()
    trained(estimator, list(gradients(seed=1)[:, 0]), [None] * STEPS)
    assert estimator.num_commits == STEPS
