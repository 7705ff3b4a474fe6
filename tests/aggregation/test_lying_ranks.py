"""Five ranks, of which one or two tell others different things about the rows of a step, or about what they heard."""

import random
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from functools import cache
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from lying import saying
from rank_pool import RankPool
from torch import Tensor, nn

from lightning_byzantine import EquivocationError
from lightning_byzantine.aggregation.engine import AggregationEngine
from lightning_byzantine.aggregation.gradient_block import GradientBlock
from lightning_byzantine.aggregation.observers import Observers
from lightning_byzantine.aggregation.quarantine import Quarantine
from lightning_byzantine.aggregation.robust_aggregation import RobustAggregation
from lightning_byzantine.aggregators import Aggregator, CenteredClipping, Krum, PersistentFilter
from lightning_byzantine.estimators import WorkerMomentum
from lightning_byzantine.exchange import make_exchange
from lightning_byzantine.exchange.case import Case
from lightning_byzantine.exchange.witnesses import Witnesses

SIZES = {"weight": 130, "bias": 7, "late": 110}
NONCE, STATEMENT = 16, 32
HONEST, COLLUDING = (0, 2, 3, 4), (1, 3)


def noise(row: Tensor, dst: int) -> Tensor:
    return row + torch.randn(row.shape, generator=torch.Generator().manual_seed(dst))


def one_bit(row: Tensor, dst: int) -> Tensor:
    row.view(torch.int32)[dst] ^= 1
    return row


def is_row(tensor: Tensor) -> bool:
    return tensor.is_floating_point()


def is_message(length: int) -> Callable[[Tensor], bool]:
    return lambda tensor: tensor.dtype == torch.uint8 and tensor.numel() == length


@dataclass
class Lie:
    """What a rank sends instead of what ``when`` chooses by its looks, and what it states in broadcasts."""

    when: Callable[[Tensor], bool] = lambda tensor: False
    forge: Callable[[Tensor, int], Tensor] = noise
    to: tuple[int, ...] = (0, 1, 2, 3, 4)
    broadcast: Callable[[bytes | None], bytes | None] = lambda statement: statement
    transfer: Callable[[Tensor], Tensor] = lambda rows: rows


def accuses(rank: int) -> Callable[[bytes | None], bytes | None]:
    """Say in tables that another rank sent something else."""

    def altered(statement: bytes | None) -> bytes | None:
        if statement is None or len(statement) != 5 * 80:
            return statement
        return statement[: 80 * rank] + bytes(80) + statement[80 * (rank + 1) :]

    return altered


LIES: dict[str, dict[int, Lie]] = {
    "nobody": {},
    "other rows for all": {1: Lie(is_row)},
    "NaN for some": {1: Lie(is_row, lambda row, dst: row * torch.nan, to=(0, 2, 3))},
    "one bit for all": {1: Lie(is_row, one_bit)},
    "other rows for one": {1: Lie(is_row, to=(3,))},
    "other rows for one of both": {1: Lie(is_row, to=(3,)), 2: Lie(is_row, to=(4,))},
    "other nonces": {1: Lie(is_message(NONCE), lambda message, dst: message + dst)},
    "other statements": {1: Lie(is_message(STATEMENT), lambda message, dst: message + dst)},
    "another statement for one": {1: Lie(is_message(STATEMENT), lambda message, dst: message + 1, to=(3,))},
    "a wrong statement": {1: Lie(is_message(STATEMENT), lambda message, dst: message + 1)},
    "no reason to complain": {1: Lie(broadcast=lambda statement: b"" if statement is None else statement)},
    "an honest rank accused": {2: Lie(is_row), 1: Lie(broadcast=accuses(0))},
    "silence in disputes": {2: Lie(is_row), 1: Lie(broadcast=lambda statement: None)},
    "a wrong result": {2: Lie(is_row), 1: Lie(broadcast=lambda s: bytes(32) if s is not None and len(s) == 32 else s)},
    "other rows passed on": {1: Lie(is_row, to=(3,)), 0: Lie(transfer=lambda rows: rows + 1)},
}


def random_lie(seed: int) -> Lie:
    """Return what lies about anything to anybody, otherwise each time."""
    generator = random.Random(seed)

    def forge(tensor: Tensor, dst: int) -> Tensor:
        if tensor.dtype == torch.uint8:
            return tensor + generator.randrange(1, 5)
        return generator.choice([noise, one_bit, lambda row, dst: row * torch.nan])(tensor, dst)

    def broadcast(statement: bytes | None) -> bytes | None:
        if statement is None:
            return generator.choice([None, None, b""])
        lies = [bytes(len(statement)), None, b"nonsense", accuses(generator.randrange(5))(statement)]
        return generator.choice([statement] * 4 + lies)

    return Lie(
        when=lambda tensor: (is_row(tensor) or tensor.numel() in (NONCE, STATEMENT)) and generator.random() < 0.2,
        forge=forge,
        broadcast=broadcast,
        transfer=lambda rows: rows + generator.choice([0, 0, 1]),
    )


def lying(lie: Lie, witnesses: Witnesses) -> ExitStack:
    broadcast, transfer = witnesses.broadcast, witnesses.channel.transfer

    def say(tensor: Tensor, dst: int) -> Tensor:
        return lie.forge(tensor, dst) if lie.when(tensor) and dst in lie.to else tensor

    def transferring(sent: list[tuple[Tensor, int]], received: list[tuple[Tensor, int]]) -> None:
        transfer([(lie.transfer(rows), rank) for rows, rank in sent], received)

    stack = ExitStack()
    stack.enter_context(saying(say))
    stack.enter_context(mock.patch.object(witnesses, "broadcast", lambda said: broadcast(lie.broadcast(said))))
    stack.enter_context(mock.patch.object(witnesses.channel, "transfer", transferring))
    return stack


@dataclass
class Run:
    received: Tensor
    named: list[list[int]]
    proved: set[int]
    pairs: set[tuple[int, int]]
    disputes: int


def drive(
    name: str,
    rule: Aggregator | None = None,
    steps: int = 4,
    checked: bool = True,
    without: tuple[int, ...] = (),
    max_faulty: int = 2,
    seed: int | None = None,
) -> Run | str:
    """Return what the optimizer receives, [steps, d], and who was named; or the error."""
    rank, rule = dist.get_rank(), PersistentFilter() if rule is None else rule
    observers, quarantine, named = Observers(), Quarantine(), []
    observers.add(lambda r: named.append([] if r.equivocated is None else r.equivocated.nonzero().flatten().tolist()))
    if without:
        quarantine.add(without, rule, 5, 2, proved=True)

    def exclude(ranks: frozenset[int]) -> None:
        observers.note_equivocated(ranks)
        quarantine.add(ranks, rule, 5, 2, proved=True)

    witnesses = Witnesses(max_faulty, torch.device("cpu"), exclude)
    engine = AggregationEngine(
        {name: nn.Parameter(torch.zeros(size)) for name, size in SIZES.items()},
        RobustAggregation(rule, 2, quarantine, observers),
        make_exchange("all_gather", 5, witnesses if checked else None),
        WorkerMomentum(),
    )
    gradients = torch.randn(steps, 5, sum(SIZES.values()), generator=torch.Generator().manual_seed(0))
    received, settle, disputes = [], Case.settle, []

    def settling(case: Case) -> None:
        disputes.append(case)
        settle(case)

    lie = LIES[name].get(rank, Lie())
    if seed is not None and rank in COLLUDING:
        lie = random_lie(seed + rank)
    with lying(lie, witnesses), mock.patch.object(Case, "settle", settling):
        for workers in gradients:
            own = dict(zip(SIZES, workers[rank].split(list(SIZES.values())), strict=True))
            late = own.pop("late")
            blocks = [GradientBlock.of(own), GradientBlock.of({"late": late})]
            try:
                for block in blocks:
                    engine.send(block)
                engine.aggregate()
            except EquivocationError as error:
                return str(error)
            received.append(torch.cat([block.buffer for block in blocks]))
    conflicts = witnesses.conflicts
    return Run(torch.stack(received), named, set(conflicts.proved), conflicts.pairs, len(disputes))


# Who is proved to lie, and in how many steps there is a dispute.
EXPECTED = {
    "nobody": (set(), 0),
    "other rows for all": ({1}, 1),
    "NaN for some": ({1}, 1),
    "one bit for all": ({1}, 1),
    "other rows for one": (set(), 1),
    "other rows for one of both": (set(), 1),
    "other nonces": ({1}, 1),
    "other statements": ({1}, 1),
    "another statement for one": (set(), 1),
    "a wrong statement": ({1}, 1),
    "no reason to complain": ({1}, 1),
    "an honest rank accused": ({2}, 1),
    "silence in disputes": ({1, 2}, 1),
    "a wrong result": ({1, 2}, 1),
    "other rows passed on": (set(), 1),
}


# A dispute takes half a second, of which most is for signatures.
RARE = (
    "NaN for some",
    "other nonces",
    "another statement for one",
    "silence in disputes",
    "other rows for one of both",
)


@pytest.mark.parametrize("name", [pytest.param(name, marks=pytest.mark.slow if name in RARE else ()) for name in LIES])
def test_honest_ranks_stay_together_and_name_who_it_was(five_ranks: RankPool, name: str) -> None:
    results = five_ranks.run(drive, name)
    proved, disputes = EXPECTED[name]
    honest = [run for rank, run in enumerate(results) if rank not in LIES[name]]
    for run in honest:
        assert torch.equal(run.received, honest[0].received)
        assert run.proved == proved
        assert run.named == [sorted(proved), [], [], []]
        assert run.disputes == disputes
        assert not any({0, 2, 3, 4}.difference(LIES[name]).issuperset(pair) for pair in run.pairs)
    # As if the liar had been left out from the start, or had not lied.
    assert torch.equal(honest[0].received, received_without(five_ranks, tuple(proved)))


@cache
def received_without(ranks: RankPool, proved: tuple[int, ...]) -> Tensor:
    return ranks.run(drive, "nobody", without=proved)[0].received


@pytest.mark.slow
def test_whatever_two_liars_do_the_others_stay_together(five_ranks: RankPool) -> None:
    for seed in range(0, 80, 10):
        results = five_ranks.run(drive, "nobody", steps=5, seed=seed)
        for rank in (0, 2, 4):
            run, first = results[rank], results[0]
            assert torch.equal(run.received, first.received), seed
            assert (run.named, run.proved, run.pairs) == (first.named, first.proved, first.pairs), seed
            assert run.proved <= set(COLLUDING), seed
            assert not any({0, 2, 4}.issuperset(pair) for pair in run.pairs), seed


@pytest.mark.parametrize("rule", [PersistentFilter(), Krum(), CenteredClipping(tau=1.0)], ids=repr)
def test_checks_change_no_bit(five_ranks: RankPool, rule: Aggregator) -> None:
    checked, unchecked = (five_ranks.run(drive, "nobody", rule, checked=checked) for checked in (True, False))
    for run, other in zip(checked, unchecked, strict=True):
        assert torch.equal(run.received, other.received)


@pytest.mark.parametrize("rule", [pytest.param(Krum(), marks=pytest.mark.slow), CenteredClipping(tau=1.0)], ids=repr)
def test_rules_start_again_from_what_they_remembered(five_ranks: RankPool, rule: Aggregator) -> None:
    results = five_ranks.run(drive, "other rows for all", rule)
    expected = five_ranks.run(drive, "nobody", rule, without=(1,))
    for rank in HONEST:
        assert torch.equal(results[rank].received, expected[0].received)


def test_more_liars_than_there_may_be_end_the_run(five_ranks: RankPool) -> None:
    for said in five_ranks.run(drive, "silence in disputes", max_faulty=1):
        assert said == "ranks 1, 2 are proved to be faulty, but of 5 ranks no more than 1 may be"
