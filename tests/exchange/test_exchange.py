from typing import Any
from unittest import mock

import pytest
import torch
from combinations import COMBINATIONS, RULES, fit_combination, fit_faulty, fit_scaled
from rank_pool import RankPool
from torch import Tensor
from training import Regression, fit

from lightning_byzantine import ByzantineDDPStrategy
from lightning_byzantine.aggregators import (
    ARC,
    CAF,
    CTMA,
    NNM,
    SMEA,
    Aggregator,
    CenteredClipping,
    Clipping,
    ComparativeGradientElimination,
    CoordinateWiseMedian,
    GeometricMedian,
    Krum,
    MeaMed,
    MinimumDiameterAveraging,
    MoNNA,
    MultiKrum,
    PersistentFilter,
)
from lightning_byzantine.attacks import (
    ALittleIsEnough,
    Attack,
    BitFlip,
    GaussianNoise,
    InnerProductManipulation,
    Intermittent,
    Mimic,
    MinMax,
    NonFinite,
    OptimalALittleIsEnough,
    OptimalInnerProductManipulation,
    SignFlip,
    StaleGradient,
)
from lightning_byzantine.callbacks import ByzantineSimulation
from lightning_byzantine.exchange import EXCHANGES, AllToAll, collectives, make_exchange


def exchange_blocks(name: str, blocks: list[list[Tensor]], rule: Aggregator, num_byzantine: int) -> list[Tensor]:
    """Start this rank's row of every block, aggregate twice, return the second result."""
    exchange = make_exchange(name, torch.distributed.get_world_size())
    for _ in range(2):
        for block in blocks:
            exchange.start(block[torch.distributed.get_rank()].clone()[None])
        result = exchange.collect(rule.aggregate(exchange.finish(), num_byzantine))
    return result


def blocks_of(lengths: list[int], dtypes: list[torch.dtype], m: int, seed: int = 0) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [
        torch.randn(m, length, generator=generator).to(dtype) for length, dtype in zip(lengths, dtypes, strict=True)
    ]


@pytest.mark.parametrize("lengths", [[9], [1, 2, 3], [100, 1, 0, 7], [40_000, 3]], ids=str)
@pytest.mark.parametrize("name", EXCHANGES)
def test_every_rank_gets_whole_blocks_in_their_dtypes(ranks: RankPool, name: str, lengths: list[int]) -> None:
    dtypes = [torch.float32, torch.float64, torch.bfloat16, torch.float32][: len(lengths)]
    blocks = blocks_of(lengths, dtypes, ranks.num_ranks)
    results = ranks.run(exchange_blocks, name, blocks, CTMA(CoordinateWiseMedian()), (ranks.num_ranks - 1) // 2)
    expected = results_on_one_process(blocks, CTMA(CoordinateWiseMedian()), (ranks.num_ranks - 1) // 2)
    for result in results:
        for actual, wanted in zip(result, expected, strict=True):
            assert actual.dtype == wanted.dtype
            assert torch.equal(actual, wanted)


def results_on_one_process(blocks: list[Tensor], rule: Aggregator, num_byzantine: int) -> list[Tensor]:
    from lightning_byzantine.matrix import WorkerMatrix

    return rule.aggregate(WorkerMatrix(blocks), num_byzantine)


@pytest.mark.parametrize("rule", [Krum(), MultiKrum(num_selected=1), CTMA(CoordinateWiseMedian())], ids=str)
def test_near_ties_are_decided_alike(three_ranks: RankPool, rule: Aggregator) -> None:
    # Row 1 is as far from row 0 as row 2 is, but for the last bit of one entry; the sum's order would decide.
    base = torch.randn(1, 999, generator=torch.Generator().manual_seed(1))
    step = torch.randn(1, 999, generator=torch.Generator().manual_seed(2))
    rows = torch.cat([base, base + step, base - step])
    rows[2, 500] = torch.nextafter(rows[2, 500], torch.tensor(torch.inf))
    gathered, sharded = (three_ranks.run(exchange_blocks, name, [rows], rule, 1) for name in EXCHANGES)
    for result in [*gathered, *sharded]:
        assert torch.equal(result[0], gathered[0][0])


@pytest.mark.parametrize(
    "rule",
    [
        MeaMed(),
        MinimumDiameterAveraging(),
        MoNNA(reference=1),
        ComparativeGradientElimination(),
        CAF(),
        SMEA(),
        CenteredClipping(tau=2.0),
        Clipping(CoordinateWiseMedian(), max_norm=2.0),
        ARC(NNM(SMEA())),
    ],
    ids=lambda rule: repr(rule).replace("\n", " "),
)
def test_rules_give_the_same_under_both(three_ranks: RankPool, rule: Aggregator) -> None:
    blocks = blocks_of([100, 1, 0, 7], [torch.float32] * 4, 3, seed=4)
    expected = torch.cat(results_on_one_process(blocks, rule, 1))
    gathered, sharded = (three_ranks.run(exchange_blocks, name, blocks, rule, 1) for name in EXCHANGES)
    for results in (gathered, sharded):
        for result in results:
            assert torch.equal(torch.cat(result), torch.cat(results[0]))
            torch.testing.assert_close(torch.cat(result), expected, rtol=1e-6, atol=1e-6)


def assert_alike(sharded: Tensor, gathered: Tensor, rule: Aggregator | None = None) -> None:
    """Compare what was trained with each exchange: to the bit, if the rule selects rows.

    Weights that are computed depend on sums over all columns, whose order differs.
    """
    rules = [PersistentFilter()] if rule is None else list(rule.modules())
    has_sums = any(isinstance(part, GeometricMedian | PersistentFilter) for part in rules)
    torch.testing.assert_close(sharded, gathered, rtol=0, atol=1e-5 if has_sums else 0)


# All rules with the default, all estimators with a rule that has other rules in it.
RULES_AND_ESTIMATORS = [
    pytest.param(rule, estimator, marks=() if estimator == "auto" or rule is RULES[-1] else pytest.mark.slow)
    for rule in RULES
    for estimator in ("auto", None)
]


@pytest.mark.parametrize(("rule", "estimator"), RULES_AND_ESTIMATORS, ids=lambda value: " ".join(str(value).split()))
def test_both_exchanges_train_alike(three_ranks: RankPool, rule: Aggregator, estimator: Any) -> None:
    gathered, sharded = (
        three_ranks.run(
            fit_combination,
            "many buckets",
            "SGD",
            ByzantineDDPStrategy,
            aggregator=rule,
            estimator=estimator,
            exchange=name,
        )
        for name in EXCHANGES
    )
    for history in sharded:
        assert torch.equal(history, sharded[0])
    assert_alike(sharded[0], gathered[0], rule)


@pytest.mark.parametrize("name", COMBINATIONS)
def test_all_to_all_holds_wherever_all_gather_does(three_ranks: RankPool, name: str) -> None:
    gathered, sharded = (
        three_ranks.run(fit_combination, name, "SGD", ByzantineDDPStrategy, exchange=exchange) for exchange in EXCHANGES
    )
    for history in sharded:
        assert torch.equal(history, sharded[0])
    assert_alike(sharded[0], gathered[0])


def fit_attacked(attack: Attack, byzantine: int, exchange: str) -> Tensor:
    torch.manual_seed(3)
    callbacks = [ByzantineSimulation(attack, [byzantine])]
    return fit(ByzantineDDPStrategy(exchange=exchange), Regression(), callbacks=callbacks)


ATTACKS: list[Attack] = [
    SignFlip(),
    InnerProductManipulation(),
    ALittleIsEnough(z=1.0),
    NonFinite(),
    Mimic(),
    BitFlip(bit=27, probability=0.5),
    StaleGradient(delay=2),
    Intermittent(SignFlip(), probability=0.5),
    OptimalALittleIsEnough(evaluations=4),
    OptimalInnerProductManipulation(evaluations=4),
]


@pytest.mark.parametrize(
    ("attack", "byzantine"),
    [
        pytest.param(attack, byzantine, marks=() if byzantine == (0, 2)[index % 2] else pytest.mark.slow)
        for index, attack in enumerate(ATTACKS)
        for byzantine in (0, 2)
    ],
    ids=str,
)
def test_attacks_are_the_same_under_both(three_ranks: RankPool, attack: Attack, byzantine: int) -> None:
    gathered, sharded = (three_ranks.run(fit_attacked, attack, byzantine, exchange) for exchange in EXCHANGES)
    for history in sharded:
        assert torch.equal(history, sharded[0])
    assert_alike(sharded[0], gathered[0])


def tampered_blocks(name: str, blocks: list[list[Tensor]], attack: Attack) -> list[Tensor]:
    """Return the whole row that worker 0 is given."""
    exchange = make_exchange(name, torch.distributed.get_world_size())
    for block in blocks:
        exchange.start(block[torch.distributed.get_rank()].clone()[None])
    matrix = attack.tamper(exchange.finish(), [0])
    return exchange.collect([block[0] for block in matrix.blocks])


@pytest.mark.parametrize("perturbation", ["std", "unit", "sign"])
def test_statistics_of_whole_rows_are_the_same_under_both(three_ranks: RankPool, perturbation: str) -> None:
    blocks = blocks_of([100, 1, 7, 1000], [torch.float32] * 4, m=3)
    gathered, sharded = (three_ranks.run(tampered_blocks, name, blocks, MinMax(perturbation)) for name in EXCHANGES)
    expected = MinMax(perturbation)(torch.cat(blocks, dim=1), [0])[0]
    for forged in [*gathered, *sharded]:
        torch.testing.assert_close(torch.cat(forged), expected)
    assert all(torch.equal(torch.cat(forged), torch.cat(sharded[0])) for forged in sharded)


def completed(lengths: list[int], is_direct: bool) -> list[Tensor]:
    """Return blocks of which each rank has written its own columns, and others NaN, after all were completed."""
    exchange = AllToAll(torch.distributed.get_world_size())
    wholes = []
    for length in lengths:
        whole, columns = torch.full((length,), torch.nan), exchange.columns_of(length)
        whole[columns] = torch.arange(float(length))[columns]
        wholes.append(whole)
    with mock.patch.object(collectives, "is_direct", lambda device: is_direct):
        exchange.complete(wholes)
    return wholes


@pytest.mark.parametrize("is_direct", [True, False], ids=["directly", "by gathering"])
def test_ranks_complete_blocks_in_place(three_ranks: RankPool, is_direct: bool) -> None:
    lengths = [0, 1, 2, 3, 4, 1000, 1001]
    for wholes in three_ranks.run(completed, lengths, is_direct):
        for whole, length in zip(wholes, lengths, strict=True):
            assert torch.equal(whole, torch.arange(float(length)))


def tamper_shards(attack: Attack, length: int) -> Tensor:
    """Return the noise that the workers 0 and 1 were given, put together from all ranks' shards."""
    exchange = AllToAll(torch.distributed.get_world_size())
    exchange.start(torch.zeros(1, length))
    matrix = attack.tamper(exchange.finish(), [0, 1])
    return torch.stack([exchange.collect([matrix.blocks[0][row]])[0].clone() for row in (0, 1)])


def test_noise_is_independent_over_shards(three_ranks: RankPool) -> None:
    noise, *others = three_ranks.run(tamper_shards, GaussianNoise(), 3_000)
    assert all(torch.equal(noise, other) for other in others)
    shards = [row[start : start + 1000] for row in noise for start in (0, 1000, 2000)]
    assert torch.corrcoef(torch.stack(shards)).fill_diagonal_(0).abs().max() < 0.15


def test_faults_and_loss_scales_are_handled_alike(three_ranks: RankPool) -> None:
    for function, faulty in ((fit_faulty, [0]), (fit_faulty, [2])):
        gathered, sharded = (three_ranks.run(function, faulty, exchange=exchange) for exchange in EXCHANGES)
        assert_alike(sharded[1], gathered[1])
    for faulty in ([1], [0, 1]):
        gathered, sharded = (three_ranks.run(fit_scaled, faulty, exchange=exchange) for exchange in EXCHANGES)
        assert_alike(sharded[1][0], gathered[1][0])
        assert sharded[1][1] == gathered[1][1]


def test_one_worker_needs_no_exchange(one_rank: RankPool) -> None:
    gathered, sharded = (
        one_rank.run(fit_combination, "plain", "SGD", ByzantineDDPStrategy, exchange=exchange) for exchange in EXCHANGES
    )
    assert torch.equal(gathered[0], sharded[0])


def test_an_unknown_exchange_is_named() -> None:
    with pytest.raises(ValueError, match="exchange must be one of all_gather, all_to_all, got 'all_reduce'"):
        ByzantineDDPStrategy(exchange="all_reduce")
