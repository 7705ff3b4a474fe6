"""A worker's step is computed once more by all other ranks: who lies is proved, who is honest is not."""

import random
from collections.abc import Callable, Iterator, Sequence
from itertools import cycle
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import lightning.pytorch as pl
import numpy as np
import pytest
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from rank_pool import RankPool
from torch import Tensor, nn
from torchmetrics import SumMetric
from training import Regression, fit

from lightning_byzantine import ByzantineDDPStrategy
from lightning_byzantine.attacks import BitFlip, GaussianNoise, Scale, SignFlip, StaleGradient
from lightning_byzantine.attacks.attack import Attack, DataAttack, VectorAttack
from lightning_byzantine.callbacks import ByzantineSimulation
from lightning_byzantine.optim import DoubleMomentumEstimator
from lightning_byzantine.strategies.audits import audits, parcel
from lightning_byzantine.strategies.audits.statement import Finding, Statement
from lightning_byzantine.strategies.audits.verdict import Outcome, Verdict

WRONGLY, RIGHTLY, INCONCLUSIVE = Outcome
DOUBLE_MOMENTUM = DoubleMomentumEstimator(min_beta=0.2, min_gamma=0.2, weighted=False)


class Auditing(pl.Callback):
    """Has workers audited one after the other, from the third step or the given ones on, and keeps the verdicts."""

    def __init__(self, workers: Sequence[int], start: Sequence[int] = ()) -> None:
        self.verdicts: list[Verdict] = []
        self._start = [*start, *[2] * (len(workers) - len(start))]
        self._remaining = list(workers)
        self._coming: int | None = None

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        trainer.strategy.observe_verdicts(self.keep)

    def on_train_batch_end(self, trainer: pl.Trainer, *_: Any) -> None:
        if self._coming is None and self._remaining and trainer.global_step >= self._start[0]:
            self._coming = self._remaining.pop(0)
            self._start.pop(0)
            trainer.strategy.audit(self._coming)
        trainer.should_stop = self._coming is None and not self._remaining

    def keep(self, verdict: Verdict) -> None:
        self.verdicts.append(verdict)
        if verdict.worker == self._coming:
            self._coming = None


class CopiedRow(VectorAttack):
    """Sends an honest worker's row and some noise, so that this worker looks like one of many."""

    def forge(self, honest: Tensor, own: Tensor) -> Tensor:
        generator = torch.Generator().manual_seed(1)
        noise = torch.randn(own.shape, generator=generator) / honest.shape[1] ** 0.5
        return honest[:1] + 0.05 * honest[:1].norm() * noise


class OtherTargets(DataAttack):
    """Trains on targets of the other sign, rightly."""

    def poison(self, batch: Any) -> Any:
        return [batch[0], -batch[1]]


class Small(Regression):
    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.01)


class Random(Small):
    """With dropout, random numbers of all kinds, batch normalization and a counter."""

    def __init__(self) -> None:
        super().__init__()
        self.network = nn.Sequential(nn.Linear(8, 16), nn.BatchNorm1d(16), nn.Dropout(0.3), nn.Linear(16, 1))
        self.calls = 0

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        self.calls += 1
        return super().training_step(batch, batch_idx) * (1 + random.random() + np.random.rand() + self.calls % 3)


def audited(
    workers: Sequence[int],
    attacks: dict[int, Attack] | None = None,
    model: type[pl.LightningModule] = Small,
    num_batches: int = 100,
    options: dict[str, Any] | None = None,
    expelled: Sequence[int] = (),
    proved: bool = True,
    start: Sequence[int] = (),
    **strategy: Any,
) -> list[Verdict]:
    auditing = Auditing(workers, start)
    callbacks = [ByzantineSimulation(attack, [worker]) for worker, attack in (attacks or {}).items()]
    callbacks += [Expelling(expelled, proved)] if expelled else []
    fit(ByzantineDDPStrategy(**strategy), model(), num_batches, callbacks=[*callbacks, auditing], **(options or {}))
    return auditing.verdicts


def agreed(results: list[list[Verdict]]) -> list[Verdict]:
    """Return the verdicts, which are the same on all ranks."""
    assert all(str(verdicts) == str(results[0]) for verdicts in results)
    return results[0]


def outcomes(results: list[list[Verdict]]) -> dict[int, Outcome]:
    return {verdict.worker: verdict.outcome for verdict in agreed(results)}


FAULTS = {1: BitFlip(bit=22), 2: BitFlip(bit=12), 4: CopiedRow(), 7: StaleGradient(10)}
MORE_FAULTS = FAULTS | {5: SignFlip(), 8: Scale(10.0), 10: GaussianNoise()}


@pytest.mark.parametrize(
    ("workers_per_process", "faults"),
    [pytest.param(3, FAULTS, id="some"), pytest.param(5, MORE_FAULTS, id="more", marks=pytest.mark.slow)],
)
def test_tells_wrong_computations_from_other_data(
    three_ranks: RankPool, workers_per_process: int, faults: dict[int, Attack]
) -> None:
    k = workers_per_process
    results = three_ranks.run(
        audited, range(3 * k), faults | {3: OtherTargets()}, num_batches=8 * 3 * k * k, workers_per_process=k
    )
    expected = {worker: WRONGLY if worker in faults else RIGHTLY for worker in range(3 * k)}
    assert outcomes(results) == expected


SETTINGS: dict[str, dict[str, Any]] = {
    "raw": {"estimator": None, "max_worker_grad_norm": 0.1, "options": {"precision": "bf16-mixed"}},
    "double": {
        "estimator": DOUBLE_MOMENTUM,
        "exchange": "all_to_all",
        "max_worker_grad_norm": 0.5,
        "options": {"accumulate_grad_batches": 2},
    },
    "momentum": {"exchange": "all_to_all"},
    "shadow": {"shadow": True},
}


@pytest.mark.parametrize("setting", SETTINGS)
def test_finds_honest_workers_honest_and_a_faulty_one_faulty(three_ranks: RankPool, setting: str) -> None:
    results = three_ranks.run(audited, range(3), {1: BitFlip(bit=22)}, Random, **SETTINGS[setting])
    assert outcomes(results) == {0: RIGHTLY, 1: WRONGLY, 2: RIGHTLY}


def test_is_its_own_auditor_in_a_single_process(one_rank: RankPool) -> None:
    results = one_rank.run(
        audited, range(3), {0: SignFlip()}, Random, workers_per_process=3, options={"limit_train_batches": 180}
    )
    assert outcomes(results) == {0: WRONGLY, 1: RIGHTLY, 2: RIGHTLY}


def nonsense() -> Iterator[Callable[[Tensor], Tensor]]:
    """Return what liars make of their statements."""
    frame = Statement(Finding.RECOMPUTED, True, residual=1e9, scale=1.0, sketch=torch.full((1024,), 1e9).double())
    save = Statement(Finding.RECOMPUTED, True, residual=0.0, scale=1.0)
    return cycle(
        [
            lambda packed: packed * torch.nan,
            lambda packed: torch.full_like(packed, 1e300),
            lambda packed: frame.packed(),
            lambda packed: save.packed(),
            lambda packed: -packed,
        ]
    )


def audited_beside_liars(liars: list[int], workers: list[int], **kwargs: Any) -> list[Verdict]:
    honest, lies = Statement.packed, nonsense()
    if torch.distributed.get_rank() not in liars:
        return audited(workers, **kwargs)
    with mock.patch.object(Statement, "packed", lambda statement: next(lies)(honest(statement))):
        return audited(workers, **kwargs)


def test_liars_neither_frame_others_nor_save_themselves(five_ranks: RankPool) -> None:
    attacks = {3: BitFlip(bit=22), 4: SignFlip()}
    verdicts = agreed(five_ranks.run(audited_beside_liars, [3, 4], [3, 0, 4, 1, 2], attacks=attacks))
    assert {verdict.worker for verdict in verdicts if verdict.outcome == WRONGLY} == {3, 4}
    # Three honest workers can't say for sure that one of them computes rightly, if two liars deny it.
    assert {verdict.worker for verdict in verdicts} == {0, 1, 2, 3, 4}


class Expelling(pl.Callback):
    def __init__(self, workers: Sequence[int], proved: bool) -> None:
        self._workers, self._proved = workers, proved

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        trainer.strategy.quarantine(self._workers, proved=self._proved)


def test_those_who_are_left_prove_and_clear_each_other(five_ranks: RankPool) -> None:
    results = five_ranks.run(audited, [0, 2], {2: SignFlip()}, expelled=[3, 4])
    assert outcomes(results) == {0: RIGHTLY, 2: WRONGLY}


@pytest.mark.parametrize("expelled", [[2], [1, 2]])
def test_a_single_auditor_and_none_prove_nothing(three_ranks: RankPool, expelled: list[int]) -> None:
    (verdict,) = agreed(three_ranks.run(audited, [0], {0: SignFlip()}, expelled=expelled))
    assert verdict.outcome == INCONCLUSIVE
    assert "two at least" in str(verdict)


HEADERS: list[Callable[[Tensor], Tensor]] = [
    torch.zeros_like,
    lambda header: torch.full_like(header, 2**62),
    lambda header: torch.where(torch.arange(len(header)) < 5, header, -1),  # the kind is right
    lambda header: header.clone().index_fill_(0, torch.tensor([8]), 10**15),  # the size of the random state
    lambda header: torch.where(header == 8, 7, header),  # the width of the inputs, on which the network raises
]


def audited_with_a_bad_parcel(**kwargs: Any) -> list[Verdict]:
    """Audit worker 2, which computes rightly, but sends a bad header in each audit, and a bad random state."""
    described, state = parcel._described, audits._content
    headers = iter(HEADERS)

    def sent(content: list[Tensor], kind: str) -> Any:
        change = next(headers, None)
        return described(content, kind) if change is None else change(described(content, kind))

    def of_bad_state(batches: Any) -> Any:
        content, fixed = state(batches)
        content[2] = torch.full_like(content[2], 10**6)  # numpy would read past its state
        return content, fixed

    workers = [0, *[2] * (len(HEADERS) + 1)]
    if torch.distributed.get_rank() != 2:
        return audited(workers, **kwargs)
    with mock.patch.object(audits, "_content", of_bad_state), mock.patch.object(audits.parcel, "send", bad_send(sent)):
        return audited(workers, **kwargs)


def bad_send(described: Callable[[list[Tensor], str], Any]) -> Callable[..., None]:
    honest = parcel.send

    def send(content: list[Tensor] | None, kind: str, device: torch.device) -> None:
        with mock.patch.object(parcel, "_described", described):
            honest(content, kind, device)

    return send


def test_who_sends_no_batch_or_a_malformed_one_is_lost(three_ranks: RankPool) -> None:
    results = three_ranks.run(audited_with_a_bad_parcel)
    found = [verdict.outcome for verdict in agreed(results) if verdict.worker == 2]
    assert found == [WRONGLY] * (len(HEADERS) + 1)


class OfItsRank(Small):
    """Computes something else on each rank."""

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        return super().training_step(batch, batch_idx) * (1 + self.global_rank)


class WithAGenerator(Small):
    def __init__(self) -> None:
        super().__init__()
        self.generator = torch.Generator()

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        return super().training_step(batch, batch_idx) * torch.rand((), generator=self.generator)


class Gathers(Small):
    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        return super().training_step(batch, batch_idx) + self.all_gather(batch[0]).sum()


class Reduces(Small):
    """Has a collective of its own, in which no rank must be missing."""

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        total = batch[1].sum()
        torch.distributed.all_reduce(total)
        return super().training_step(batch, batch_idx) * (1 + total.square())


class WithAnObject(Small):
    def on_before_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        return [*batch, object()]

    def training_step(self, batch: list[Any], batch_idx: int) -> Tensor:
        return super().training_step(batch[:2], batch_idx)


class WithManyObjects(Small):
    def __init__(self) -> None:
        super().__init__()
        self.samples = list(range(400_000))


@pytest.mark.parametrize(
    ("model", "reason"),
    [
        (OfItsRank, "may depend on the rank"),
        (WithAGenerator, "can't be repeated"),
        (Gathers, "can't be repeated"),
        (Reduces, "may depend on the rank"),
        (WithAnObject, "can't be sent as tensors"),
        (WithManyObjects, "too large"),
    ],
)
def test_proves_nothing_where_steps_cant_be_repeated(
    three_ranks: RankPool, model: type[pl.LightningModule], reason: str
) -> None:
    *others, verdict = agreed(three_ranks.run(audited, [1], model=model))
    assert {found.outcome for found in [*others, verdict]} == {INCONCLUSIVE}
    assert verdict.worker == 1
    assert reason in str(verdict)


def test_no_worker_in_quarantine_is_tried_instead(three_ranks: RankPool) -> None:
    verdicts = agreed(three_ranks.run(audited, [1], {1: SignFlip()}, expelled=[2], proved=False))
    assert [verdict.worker for verdict in verdicts] == [0, 1]


class OtherBatches(Small):
    """Worker 0's batches have another structure after twelve steps."""

    def on_after_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        is_other = self.global_rank == 0 and self.trainer.global_step >= 12
        return self.other(*batch) if is_other else self.usual(*batch)

    def usual(self, inputs: Tensor, targets: Tensor) -> Any:
        return {"inputs": inputs, "targets": targets}

    def other(self, inputs: Tensor, targets: Tensor) -> Any:
        raise NotImplementedError

    def training_step(self, batch: dict[str, Any], batch_idx: int) -> Tensor:
        inputs, targets = batch.get("inputs", batch.get("opposite")), batch["targets"]
        sign = -1 if "opposite" in batch else 1
        return super().training_step([inputs, sign * targets.view(-1, 1)], batch_idx)


class OtherKeys(OtherBatches):
    def other(self, inputs: Tensor, targets: Tensor) -> Any:
        return {"opposite": inputs, "targets": targets}


class OtherDimensions(OtherBatches):
    def other(self, inputs: Tensor, targets: Tensor) -> Any:
        return {"inputs": inputs, "targets": targets.squeeze()}


class OtherDtype(OtherBatches):
    def other(self, inputs: Tensor, targets: Tensor) -> Any:
        return {"inputs": inputs, "targets": targets.half()}


class NoTensors(OtherBatches):
    def other(self, inputs: Tensor, targets: Tensor) -> Any:
        return {"inputs": inputs, "targets": targets, "more": object()}


@pytest.mark.parametrize("model", [OtherKeys, OtherDimensions, OtherDtype, NoTensors])
def test_batches_of_another_structure_prove_nothing(three_ranks: RankPool, model: type[pl.LightningModule]) -> None:
    before, verdict = agreed(three_ranks.run(audited, [1, 0], model=model, start=(2, 12)))
    assert before.outcome == RIGHTLY
    assert (verdict.worker, verdict.outcome) == (0, INCONCLUSIVE)
    assert "another structure" in str(verdict)


class ReducesWithNan(Reduces):
    """Worker 0's vectors are not finite, so that there is nothing to compute."""

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        return super().training_step(batch, batch_idx) * (torch.nan if self.global_rank == 0 else 1)


class ReducesWithAnObject(Reduces):
    """Only worker 0's batches are tensors, so that nobody else can compute with them."""

    def on_after_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        return [*batch, 1.0 if self.global_rank != 1 else object()]

    def training_step(self, batch: list[Any], batch_idx: int) -> Tensor:
        return super().training_step(batch[:2], batch_idx)


@pytest.mark.parametrize(("model", "reason"), [(ReducesWithNan, "not finite"), (ReducesWithAnObject, "as tensors")])
def test_either_all_ranks_compute_or_none(three_ranks: RankPool, model: type[pl.LightningModule], reason: str) -> None:
    (verdict,) = agreed(three_ranks.run(audited, [0], model=model))
    assert verdict.outcome == INCONCLUSIVE
    assert reason in str(verdict)


class Named(NamedTuple):
    inputs: Tensor
    more: dict[str, Any]


class NestedBatch(Small):
    def on_before_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        return Named(batch[0], {"targets": batch[1], "weight": 0.5, "name": "größer\udce9", "nothing": None})

    def training_step(self, batch: Named, batch_idx: int) -> Tensor:
        assert batch.more["name"] == "größer\udce9"  # as in names of files that are no UTF-8
        assert batch.more["nothing"] is None
        return super().training_step([batch.inputs, batch.more["targets"] * batch.more["weight"]], batch_idx)


def test_sends_nested_batches(three_ranks: RankPool) -> None:
    assert outcomes(three_ranks.run(audited, [0], model=NestedBatch)) == {0: RIGHTLY}


class SideEffects(Random):
    def __init__(self) -> None:
        super().__init__()
        self.total, self.losses = SumMetric(), [0.0]

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        loss = super().training_step(batch, batch_idx)
        self.total.update(loss)
        self.losses.append(loss.item())
        self.log("total", self.total, on_step=True, on_epoch=True)
        self.log("calls", self.calls, on_step=True)
        return loss


def trained(workers: list[int], estimator: Any, exchange: Any, folder: str) -> Any:
    """Return all that a run leaves behind, and the number of audits."""
    pl.seed_everything(3, verbose=False)
    auditing, model = Auditing(workers), SideEffects()
    auditing.on_train_batch_end = no_stop(auditing)
    logger = pl.loggers.CSVLogger(folder, name=str(torch.distributed.get_rank()), version=len(workers))
    strategy = ByzantineDDPStrategy(estimator=estimator, exchange=exchange)
    history = fit(strategy, model, 24, callbacks=[auditing], logger=logger, log_every_n_steps=1)
    logged = Path(logger.experiment.metrics_file_path).read_text() if logger.experiment.metrics == [] else ""
    left = [history.tolist(), model.losses, model.calls, [b.tolist() for b in model.buffers()], logged]
    return [*left, torch.rand(1), random.random(), np.random.rand()], len(auditing.verdicts)


def no_stop(auditing: Auditing) -> Callable[..., None]:
    audit = auditing.on_train_batch_end

    def without_stop(trainer: pl.Trainer, *args: Any) -> None:
        audit(trainer, *args)
        trainer.should_stop = False

    return without_stop


@pytest.mark.parametrize(("estimator", "exchange"), [("auto", "all_gather"), (DOUBLE_MOMENTUM, "all_to_all")])
def test_leaves_no_trace(three_ranks: RankPool, tmp_path: Any, estimator: Any, exchange: Any) -> None:
    plain, audited = (three_ranks.run(trained, workers, estimator, exchange, str(tmp_path)) for workers in ([], [0, 1]))
    for (expected, none), (left, two) in zip(plain, audited, strict=True):
        assert (none, two) == (0, 2)
        assert str(left) == str(expected)


class Manual(Small):
    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False

    def training_step(self, batch: list[Tensor], batch_idx: int) -> None:
        self.optimizers().zero_grad()
        self.manual_backward(nn.functional.mse_loss(self(batch[0]), batch[1]))
        self.optimizers().step()


class OwnBackward(Small):
    def backward(self, loss: Tensor) -> None:
        loss.backward()


class Fetching(Small):
    def training_step(self, dataloader_iter: Any) -> Tensor:
        batch, batch_idx, _ = next(dataloader_iter)
        return super().training_step(batch, batch_idx)


class SyncBatchNorm(Small):
    def __init__(self) -> None:
        super().__init__()
        self.network = nn.Sequential(nn.Linear(8, 8), nn.SyncBatchNorm(8), nn.Linear(8, 1))


@pytest.mark.parametrize(
    ("model", "num_workers", "problem"),
    [
        (Manual, 3, "automatic_optimization=False"),
        (OwnBackward, 3, "OwnBackward.backward"),
        (Fetching, 3, "dataloader_iter"),
        (SyncBatchNorm, 3, "SyncBatchNorm"),
        (Small, 1, "a single one"),
    ],
)
def test_refuses_what_cant_be_audited(model: type[pl.LightningModule], num_workers: int, problem: str) -> None:
    with pytest.raises(MisconfigurationException, match=problem):
        audits.check_auditable(model(), num_workers)


def asked_too_much() -> list[str]:
    errors = []
    for worker, model in [(0, Manual), (3, Small), (-1, Small)]:
        with pytest.raises((MisconfigurationException, ValueError)) as error:
            audited([worker], model=model)
        errors.append(str(error.value))
    return errors


def test_bad_questions_are_named(three_ranks: RankPool) -> None:
    for manual, *wrong in three_ranks.run(asked_too_much):
        assert "automatic_optimization=False" in manual
        assert all("[0, 3)" in error for error in wrong)


@pytest.mark.parametrize(("precision", "tolerance"), [("highest", 2**-11.5), ("high", 2**-5), ("medium", 2**-3.5)])
def test_tolerates_what_float32_is_rounded_to(one_rank: RankPool, precision: str, tolerance: float) -> None:
    (verdict,) = one_rank.run(audited_at, precision)[0]
    assert verdict.tolerance == pytest.approx(tolerance, rel=0.1)


def audited_at(precision: str) -> list[Verdict]:
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision(precision)
    try:
        return audited([0], workers_per_process=3, estimator=None)
    finally:
        torch.set_float32_matmul_precision(before)
