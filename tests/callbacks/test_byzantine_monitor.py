import json
import logging
import pickle
import warnings
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from math import isfinite, isnan
from pathlib import Path
from typing import Any
from unittest import mock

import lightning.pytorch as pl
import pytest
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.callbacks import ModelCheckpoint, TQDMProgressBar
from lightning.pytorch.cli import LightningCLI
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger
from rank_pool import RankPool
from torch import Tensor, nn
from training import Regression, fit, loader, trainer

from lightning_byzantine import ByzantineDDPStrategy, ByzantineSuspectError
from lightning_byzantine.aggregators import Aggregator, CoordinateWiseMedian, Mean, Report
from lightning_byzantine.attacks import Attack, NonFinite, SignFlip, VectorAttack
from lightning_byzantine.callbacks import ByzantineMonitor, ByzantineSimulation
from lightning_byzantine.monitoring import Suspect
from lightning_byzantine.optim import DoubleMomentumEstimator
from lightning_byzantine.strategies.audits.verdict import Outcome, Verdict

NUM_STEPS = 20


class Multiplied(VectorAttack):
    def __init__(self, factor: float) -> None:
        super().__init__()
        self.factor = factor

    def forge(self, honest: Tensor, own: Tensor) -> Tensor:
        return self.factor * own


class FirstSteps(Multiplied):
    """Multiplied at first, then honest."""

    def __init__(self, steps: int, factor: float = 10.0) -> None:
        super().__init__(factor)
        self.steps = steps
        self.calls = 0

    def tamper(self, matrix: Any, byzantine: Sequence[int]) -> Any:
        self.calls += 1
        return super().tamper(matrix, byzantine) if self.calls <= self.steps else matrix


class FarFromOptimum(Regression):
    """Its gradients point one way, and stay so: a flipped sign shows in few batches."""

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        return super().training_step([batch[0], batch[1] + 20], batch_idx)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=1e-5)


def fit_monitored(
    folder: Path,
    attack: Attack | None = None,
    byzantine: Sequence[int] = (1,),
    strategy: dict[str, Any] | None = None,
    num_batches: int = NUM_STEPS,
    callbacks: Sequence[pl.Callback] = (),
    model: Callable[[], Regression] = Regression,
    monitor: dict[str, Any] | None = None,
    **arguments: Any,
) -> tuple[ByzantineMonitor, Tensor, frozenset[int]]:
    """Train under the attack; return the monitor, the parameters of every step, and the quarantine."""
    torch.manual_seed(3)  # or the model would depend on which tests ran before
    watcher = ByzantineMonitor(**({"audit": None} | (monitor or {})))
    ddp = ByzantineDDPStrategy(**(strategy or {}))
    attacks = [] if attack is None else [ByzantineSimulation(attack, list(byzantine))]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        parameters = fit(
            ddp,
            model(),
            num_batches=num_batches,
            callbacks=[*attacks, watcher, *callbacks],
            default_root_dir=folder,
            **arguments,
        )
    return watcher, parameters, ddp.quarantined


def suspects_of_fit(*args: Any, **kwargs: Any) -> list[int]:
    return fit_monitored(*args, **kwargs)[0].suspects


def lines(folder: Path) -> list[dict[str, Any]]:
    path = folder / "suspects.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


VARIANTS: dict[str, dict[str, Any]] = {
    "default": {},
    "all_to_all": {"exchange": "all_to_all"},
    "double momentum": {"estimator": DoubleMomentumEstimator(beta=0.1, gamma=0.1, weighted=False)},
    "shadow": {"shadow": True},
}
ATTACKS: dict[str, Attack] = {
    "nan": NonFinite(),
    "x 10": Multiplied(10.0),
    "zero": Multiplied(0.0),
    "sign flip": SignFlip(),
}
ALWAYS = [("default", attack) for attack in ATTACKS]
ALWAYS += [("all_to_all", "nan"), ("all_to_all", "x 10"), ("double momentum", "sign flip"), ("shadow", "zero")]
SOMETIMES = [
    pytest.param(variant, attack, marks=pytest.mark.slow)
    for variant in VARIANTS
    for attack in ATTACKS
    # Stock DDP has nothing but NaN after one of them.
    if (variant, attack) not in [*ALWAYS, ("shadow", "nan")]
]


@pytest.mark.parametrize(("variant", "name"), [*ALWAYS, *SOMETIMES])
def test_names_the_bad_worker_on_every_rank(five_ranks: RankPool, tmp_path: Path, variant: str, name: str) -> None:
    attack = ATTACKS[name]
    for suspects in five_ranks.run(suspects_of_fit, tmp_path, attack, [3], VARIANTS[variant], model=FarFromOptimum):
        assert suspects == [3]
    first, *_ = lines(tmp_path)
    event = "proved" if name == "nan" else "suspected"
    assert (first["event"], first["worker"], first["rank"], first["device"]) == (event, 3, 3, "cpu")
    assert first["step"] <= NUM_STEPS and first["host"]
    if name == "nan":
        assert first["non_finite"] == first["trimmed"] == first["steps"]
    elif name == "x 10":
        assert first["distance"] > 3
    elif name == "sign flip":
        assert first["opposed"] == first["steps"]


class WrongBesideGradients(Regression):
    """On rank 3, NaN in the buffers or in what is logged, and a sound gradient."""

    def __init__(self, place: str) -> None:
        super().__init__()
        self.network.insert(1, nn.BatchNorm1d(16))
        self.place = place

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        loss = super().training_step(batch, batch_idx)
        if self.global_rank == 3 and self.place == "buffers":
            self.network[1].running_mean.data.fill_(torch.nan)
        self.log("odd", torch.nan if self.global_rank == 3 and self.place == "metric" else 1.0, sync_dist=True)
        return loss


@pytest.mark.parametrize(
    ("place", "exchange"),
    [
        ("buffers", "all_gather"),
        ("metric", "all_to_all"),
        pytest.param("buffers", "all_to_all", marks=pytest.mark.slow),
        pytest.param("metric", "all_gather", marks=pytest.mark.slow),
    ],
)
def test_names_a_rank_that_is_outvoted_beside_its_gradient(
    five_ranks: RankPool, tmp_path: Path, place: str, exchange: str
) -> None:
    options = {"robust_metrics": True, "exchange": exchange}
    model = partial(WrongBesideGradients, place)
    assert five_ranks.run(suspects_of_fit, tmp_path, strategy=options, model=model) == [[3]] * 5
    first, *_ = lines(tmp_path)
    assert first["step"] - first["outvoted"] in (0, 1)  # before the first step, nobody had voted on buffers
    assert first["non_finite"] == 0


class Wide(Regression):
    """Has gradients of many columns."""

    def __init__(self) -> None:
        super().__init__()
        self.network = nn.Sequential(nn.Linear(8, 200), nn.Tanh(), nn.Linear(200, 1))

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=1e-3)  # with more, it would diverge from some initial values


@pytest.mark.parametrize("num_batches", [40, pytest.param(100, marks=pytest.mark.slow)])
def test_nobody_is_suspected_without_reason(five_ranks: RankPool, tmp_path: Path, num_batches: int) -> None:
    assert five_ranks.run(suspects_of_fit, tmp_path, num_batches=num_batches) == [[]] * 5
    assert lines(tmp_path) == []


def test_a_worker_that_recovers_is_cleared(five_ranks: RankPool, tmp_path: Path) -> None:
    assert five_ranks.run(suspects_of_fit, tmp_path, FirstSteps(12), [2], num_batches=40) == [[]] * 5
    assert [(line["event"], line["worker"]) for line in lines(tmp_path)] == [("suspected", 2), ("cleared", 2)]


def error_of_fit(folder: Path) -> ByzantineSuspectError:
    with pytest.raises(ByzantineSuspectError) as caught:
        fit_monitored(folder, NonFinite(), [0], monitor={"on_suspect": "raise"})
    return caught.value


def test_raises_the_same_on_every_rank(three_ranks: RankPool, tmp_path: Path) -> None:
    errors = three_ranks.run(error_of_fit, tmp_path)
    assert [error.worker for error in errors] == [0, 0, 0]
    assert len({str(error) for error in errors}) == 1
    assert "worker 0 (rank 0, host " in str(errors[0])
    assert ", cpu): proved: not finite, trimmed in 7 of the last 7 steps, non-finite in 7 of" in str(errors[0])


def warnings_of_fit(folder: Path, **arguments: Any) -> list[str]:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        with mock.patch("warnings.simplefilter"):
            fit_monitored(folder, NonFinite(), [1], **arguments)
    return [str(warning.message) for warning in caught if "worker 1" in str(warning.message)]


def test_warns_once_and_on_one_rank(three_ranks: RankPool, tmp_path: Path) -> None:
    first, *others = three_ranks.run(warnings_of_fit, tmp_path)
    assert len(first) == 1 and first[0].startswith("Proved to be faulty: worker 1 (rank 1, host ")
    assert others == [[], []]


def fit_and_look_at_rows(folder: Path, **arguments: Any) -> tuple[frozenset[int], Tensor, list[int], list[int]]:
    """Return the quarantine, the parameters, and from how many workers with which f the rule aggregated."""
    seen: list[tuple[int, int]] = []
    aggregate = Aggregator.decide

    def decide(self: Any, matrix: Any, num_byzantine: int) -> Any:
        seen.append((matrix.num_workers, num_byzantine))
        return aggregate(self, matrix, num_byzantine)

    options = {"on_suspect": "quarantine", **arguments.pop("monitor", {})}
    with mock.patch("lightning_byzantine.aggregators.Aggregator.decide", decide):
        monitor, parameters, quarantined = fit_monitored(folder, monitor=options, **arguments)
    return quarantined, parameters, monitor.suspects, [list(pair) for pair in seen]


def test_quarantine_drops_the_worker_for_good(five_ranks: RankPool, tmp_path: Path) -> None:
    results = five_ranks.run(fit_and_look_at_rows, tmp_path, attack=FirstSteps(18, torch.nan), byzantine=[3])
    for quarantined, parameters, suspects, seen in results:
        assert quarantined == {3}
        assert suspects == [3]
        assert torch.equal(parameters, results[0][1])
        assert seen[0] == [5, 2] and seen[-1] == [4, 1]
    assert [line["event"] for line in lines(tmp_path)] == ["proved", "quarantined"]


def test_quarantine_survives_a_checkpoint(three_ranks: RankPool, tmp_path: Path) -> None:
    save = ModelCheckpoint(tmp_path, filename="{step}", every_n_train_steps=10, save_top_k=-1)
    arguments = {"attack": FirstSteps(8, torch.nan), "byzantine": [2], "enable_checkpointing": True}
    whole = three_ranks.run(fit_and_look_at_rows, tmp_path, callbacks=[save], **arguments)
    assert whole[0][0] == {2}
    checkpoint = tmp_path / "step=10.ckpt"
    torch.load(checkpoint, weights_only=True)
    resumed = three_ranks.run(fit_and_look_at_rows, tmp_path / "again", ckpt_path=checkpoint)
    for quarantined, parameters, suspects, seen in resumed:
        assert quarantined == {2} and suspects == [2]
        assert seen == [[2, 0]] * (NUM_STEPS - 10) and len(parameters) == NUM_STEPS - 10
        assert torch.equal(parameters, resumed[0][1])


ONE_PROCESS = {"workers_per_process": 5}


def fit_under(policy: str, folder: Path, **options: Any) -> tuple[list[str], frozenset[int], list[int]]:
    """Train with a worker whose rows are finite; return events, the quarantine, and the last m and f."""
    strategy, monitor = {**ONE_PROCESS, "num_byzantine": 1}, {"on_suspect": policy, **options}
    arguments = {"attack": Multiplied(10.0), "byzantine": [3], "num_batches": 100, "monitor": monitor}
    try:
        quarantined, _, _, seen = fit_and_look_at_rows(folder, strategy=strategy, **arguments)
    except ByzantineSuspectError as error:
        assert error.worker == 3
        quarantined, seen = frozenset(), [[0, 0]]
    return [line["event"] for line in lines(folder)], quarantined, seen[-1]


def test_statistics_alone_punish_nobody(one_rank: RankPool, tmp_path: Path) -> None:
    for policy in ("quarantine", "raise"):
        ((events, quarantined, last),) = one_rank.run(fit_under, policy, tmp_path / policy)
        assert (events, quarantined, last) == (["suspected"], frozenset(), [5, 1])


def test_statistics_punish_if_asked_to_and_f_stays(one_rank: RankPool, tmp_path: Path) -> None:
    ((events, quarantined, last),) = one_rank.run(fit_under, "quarantine", tmp_path / "q", punish_without_proof=True)
    assert (events, quarantined, last) == (["suspected", "quarantined"], {3}, [4, 1])
    ((events, _, last),) = one_rank.run(fit_under, "raise", tmp_path / "r", punish_without_proof=True)
    assert (events, last) == (["suspected"], [0, 0])


class CopiesWithNoise(VectorAttack):
    """Sends what the first honest worker sends, with 5% noise, so that both agree with each other best."""

    def forge(self, honest: Tensor, own: Tensor) -> Tensor:
        generator = torch.Generator().manual_seed(len(own))
        noise = torch.randn(own.shape, generator=generator, dtype=own.dtype)
        return honest[0] * (1 + 0.05 * noise)


@pytest.mark.parametrize("m", [5, pytest.param(9, marks=pytest.mark.slow), pytest.param(17, marks=pytest.mark.slow)])
def test_nobody_honest_is_framed(one_rank: RankPool, tmp_path: Path, m: int) -> None:
    liars = list(range(1, (m + 1) // 2))
    arguments = {"attack": CopiesWithNoise(), "byzantine": liars, "num_batches": 30 * m}
    arguments["strategy"] = {"workers_per_process": m}
    ((quarantined, _, suspects, seen),) = one_rank.run(fit_and_look_at_rows, tmp_path, model=Wide, **arguments)
    assert quarantined == frozenset()
    assert set(suspects) <= set(liars)
    assert seen[-1] == [m, len(liars)]


class Verdicts(pl.Callback):
    """Has the strategy tell the outcomes of audits, step by step."""

    def __init__(self, outcomes: dict[int, Verdict]) -> None:
        self.outcomes = outcomes
        self.orders: list[list[int]] = []

    def on_before_optimizer_step(self, trainer: pl.Trainer, *_: Any) -> None:
        if trainer.global_step in self.outcomes:
            trainer.strategy._tell_verdict(self.outcomes[trainer.global_step])

    def on_train_batch_end(self, trainer: pl.Trainer, *_: Any) -> None:
        monitor = next(callback for callback in trainer.callbacks if isinstance(callback, ByzantineMonitor))
        self.orders.append(monitor.audit_order(trainer))


def verdict_on(worker: int, step: int, outcome: Outcome) -> dict[int, Verdict]:
    return {step: Verdict(worker, step, outcome, "", wrong=0, right=0, residual=0.0, tolerance=0.0)}


def fit_audited(folder: Path, outcome: Outcome, **arguments: Any) -> tuple[list[list[int]], frozenset[int], list[int]]:
    audits = Verdicts(verdict_on(3, 15, outcome))
    quarantined, _, suspects, _ = fit_and_look_at_rows(
        folder,
        attack=Multiplied(10.0),
        byzantine=[3],
        strategy=ONE_PROCESS,
        num_batches=5 * 30,
        callbacks=[audits, *arguments.pop("callbacks", [])],
        **arguments,
    )
    return audits.orders, quarantined, suspects


def events(folder: Path) -> list[tuple[str, str | None, str | None]]:
    return [(line["event"], line["proof"], line["verdict"]) for line in lines(folder)]


def test_a_lost_audit_is_a_proof(one_rank: RankPool, tmp_path: Path) -> None:
    ((orders, quarantined, suspects),) = one_rank.run(fit_audited, tmp_path, Outcome.WRONGLY)
    wrongly = "computes wrongly"
    assert events(tmp_path) == [
        ("suspected", None, None),
        ("audited", wrongly, wrongly),
        ("proved", wrongly, wrongly),
        ("quarantined", wrongly, wrongly),
    ]
    assert quarantined == {3} and suspects == [3]
    assert orders[5 * 12][0] == 3  # the suspect
    assert sorted(orders[-1]) == [0, 1, 2, 4]


def test_who_computes_rightly_is_not_suspected_again(one_rank: RankPool, tmp_path: Path) -> None:
    save = ModelCheckpoint(tmp_path, filename="{step}", every_n_train_steps=20, save_top_k=-1)
    arguments = {"callbacks": [save], "enable_checkpointing": True}
    ((orders, quarantined, suspects),) = one_rank.run(fit_audited, tmp_path, Outcome.RIGHTLY, **arguments)
    rightly = "computes rightly"
    expected = [("suspected", None, None), ("audited", None, rightly), ("cleared", None, rightly)]
    assert events(tmp_path) == expected
    assert quarantined == frozenset() and suspects == []
    assert orders[-1][-1] == 3  # an audit of it tells least
    checkpoint = torch.load(tmp_path / "step=20.ckpt", weights_only=True)
    assert checkpoint["global_step"] == 20
    one_rank.run(fit_audited, tmp_path, Outcome.RIGHTLY, ckpt_path=tmp_path / "step=20.ckpt")
    assert events(tmp_path) == expected


class TellsOf(pl.Callback):
    """Adds to the report of one step who told ranks different things."""

    def __init__(self, worker: int, step: int) -> None:
        self.worker, self.step = worker, step

    def on_fit_start(self, trainer: pl.Trainer, *_: Any) -> None:
        observe = trainer.strategy.observe

        def observe_more(observer: Any) -> Any:
            def told(report: Report) -> None:
                at_fault = torch.arange(len(report.norms)) == self.worker
                observer(replace(report, equivocated=at_fault) if trainer.global_step == self.step else report)

            return observe(told)

        trainer.strategy.observe = observe_more


class Called:
    def __init__(self) -> None:
        self.calls: list[tuple[int, str | None]] = []

    def __call__(self, suspect: Suspect) -> None:
        self.calls.append((suspect.worker, suspect.proof))


def calls_of_fit(folder: Path) -> list[tuple[int, str | None]]:
    called, attacks = Called(), [TellsOf(3, 15)]
    # Callbacks that are added first start first.
    torch.manual_seed(3)
    simulation = ByzantineSimulation(Multiplied(10.0), [3])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        fit(
            ByzantineDDPStrategy(**ONE_PROCESS),
            num_batches=5 * 30,
            callbacks=[*attacks, simulation, ByzantineMonitor(on_suspect=called, audit=None)],
            default_root_dir=folder,
        )
    return called.calls


def test_a_function_is_called_on_suspicion_and_again_on_proof(one_rank: RankPool, tmp_path: Path) -> None:
    assert one_rank.run(calls_of_fit, tmp_path) == [[(3, None), (3, "told ranks different things")]]


def test_what_was_proved_before_is_punished_when_resuming(one_rank: RankPool, tmp_path: Path) -> None:
    save = ModelCheckpoint(tmp_path, filename="{step}", every_n_train_steps=10, save_top_k=-1)
    saving = {"callbacks": [save], "enable_checkpointing": True}
    arguments = {"attack": FirstSteps(9, torch.nan), "byzantine": [2], "strategy": ONE_PROCESS, "num_batches": 75}
    warned = one_rank.run(fit_and_look_at_rows, tmp_path, monitor={"on_suspect": "warn"}, **arguments, **saving)
    assert warned[0][0] == frozenset() and warned[0][2] == [2]
    del arguments["attack"]
    resumed = one_rank.run(fit_and_look_at_rows, tmp_path, ckpt_path=tmp_path / "step=10.ckpt", **arguments)
    assert resumed[0][0] == {2} and resumed[0][3][0] == [4, 1]


class Scores(pl.Callback):
    """Keeps the scores of suspicion at the start and after every batch."""

    def __init__(self) -> None:
        self.history: list[Tensor] = []

    def on_train_start(self, trainer: pl.Trainer, *_: Any) -> None:
        monitor = next(callback for callback in trainer.callbacks if isinstance(callback, ByzantineMonitor))
        self.history.append(torch.tensor(monitor.state_dict()["suspicion"]["scores"]))

    def on_train_batch_end(self, trainer: pl.Trainer, *_: Any) -> None:
        self.on_train_start(trainer)


def scores_of_fit(folder: Path, **arguments: Any) -> list[Tensor]:
    scores = Scores()
    callbacks = [scores, *arguments.pop("callbacks", [])]
    fit_monitored(folder, FirstSteps(6), [2], num_batches=8, callbacks=callbacks, **arguments)
    return scores.history


def test_suspicion_survives_a_checkpoint(three_ranks: RankPool, tmp_path: Path) -> None:
    save = ModelCheckpoint(tmp_path, filename="{step}", every_n_train_steps=6, save_top_k=-1)
    whole = three_ranks.run(scores_of_fit, tmp_path, callbacks=[save], enable_checkpointing=True)
    resumed = three_ranks.run(scores_of_fit, tmp_path, ckpt_path=tmp_path / "step=6.ckpt")
    assert whole[0][6].max() > 0
    assert all(torch.equal(scores[0], whole[0][6]) and len(scores) == 3 for scores in resumed)


def warnings_of_resuming(folder: Path, checkpoint: Path) -> list[str]:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        with mock.patch("warnings.simplefilter"):
            afresh = {"restart_estimator": True}
            watcher, *_ = fit_monitored(folder, strategy=afresh, num_batches=8, ckpt_path=checkpoint)
    assert watcher.suspects == []
    return [str(warning.message) for warning in caught if "ByzantineMonitor" in str(warning.message)]


def test_says_that_a_checkpoint_of_other_workers_does_not_fit(
    three_ranks: RankPool, five_ranks: RankPool, tmp_path: Path
) -> None:
    save = ModelCheckpoint(tmp_path, filename="{step}", every_n_train_steps=6, save_top_k=-1)
    three_ranks.run(scores_of_fit, tmp_path, callbacks=[save], enable_checkpointing=True)
    said, *others = five_ranks.run(warnings_of_resuming, tmp_path, tmp_path / "step=6.ckpt")
    assert said == [
        "ByzantineMonitor starts from zero, since its state in the checkpoint does not fit: ValueError('the state is of"
        " 3 workers, got num_workers=5')."
    ]
    assert others == [[]] * 4


def test_says_that_a_checkpoint_of_another_version_does_not_fit(three_ranks: RankPool, tmp_path: Path) -> None:
    path = tmp_path / "step=6.ckpt"
    save = ModelCheckpoint(tmp_path, filename="{step}", every_n_train_steps=6, save_top_k=-1)
    three_ranks.run(scores_of_fit, tmp_path, callbacks=[save], enable_checkpointing=True)
    checkpoint = torch.load(path, weights_only=True)
    state = next(state for name, state in checkpoint["callbacks"].items() if "ByzantineMonitor" in name)
    del state["evidence"]["last"]
    torch.save(checkpoint, path)
    scores = three_ranks.run(scores_of_fit, tmp_path, ckpt_path=path)
    assert all(float(history[0].max()) == 0 for history in scores)


class NotSaved:
    """What a user may compose by class_path."""

    def __init__(self, greeting: str) -> None:
        self.greeting = greeting
        self.suspects: list[Suspect] = []

    def __call__(self, suspect: Suspect) -> None:
        self.suspects.append(suspect)


def suspects_of_callable(folder: Path) -> list[int]:
    notify = NotSaved("hello")
    fit_monitored(folder, NonFinite(), [1], monitor={"on_suspect": notify})
    return [suspect.worker for suspect in notify.suspects]


def test_calls_a_function_on_every_rank(three_ranks: RankPool, tmp_path: Path) -> None:
    assert three_ranks.run(suspects_of_callable, tmp_path) == [[1]] * 3


def monitor_from_yaml(on_suspect: Any) -> ByzantineMonitor:
    monitor = {
        "class_path": "lightning_byzantine.callbacks.ByzantineMonitor",
        "init_args": {"on_suspect": on_suspect},
    }
    arguments = {"trainer": {"strategy": "byzantine_ddp_shadow", "callbacks": [monitor], "logger": False}}
    with mock.patch("sys.argv", ["fit.py"]):
        cli = LightningCLI(Regression, run=False, args=arguments, save_config_callback=None)
    return next(callback for callback in cli.trainer.callbacks if isinstance(callback, ByzantineMonitor))


def test_yaml_says_what_to_do_with_suspects() -> None:
    composed = {"class_path": f"{__name__}.NotSaved", "init_args": {"greeting": "hi"}}
    on_suspect = monitor_from_yaml(composed).on_suspect
    assert isinstance(on_suspect, NotSaved) and on_suspect.greeting == "hi"
    for policy in ("warn", "raise", "quarantine"):
        assert monitor_from_yaml(policy).on_suspect == policy


def fit_logged(folder: Path) -> list[tuple[str, str]]:
    """Return the metrics that the progress bar shows."""
    bar = TQDMProgressBar()
    with mock.patch.object(bar, "_update_n", create=True):
        loggers = [TensorBoardLogger(folder, name="board"), CSVLogger(folder, name="csv")]
        watcher = ByzantineMonitor(every_n_steps=10, audit=None)
        shown: list[tuple[str, str]] = []
        runner = trainer(
            ByzantineDDPStrategy(),
            callbacks=[ByzantineSimulation(NonFinite(), [1]), watcher, bar, Shown(shown)],
            logger=loggers,
            enable_progress_bar=True,
            default_root_dir=folder,
        )
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            runner.fit(Regression(), loader(30))
    return shown


class Shown(pl.Callback):
    def __init__(self, shown: list[tuple[str, str]]) -> None:
        self.shown = shown

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *_: Any) -> None:
        metrics = trainer.progress_bar_callback.get_metrics(trainer, pl_module)
        self.shown.append((metrics.get("suspects", ""), metrics.get("proved", "")))


def test_logs_scalars_a_heat_map_and_the_progress_bar(three_ranks: RankPool, tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    for shown in three_ranks.run(fit_logged, tmp_path):
        assert shown[0] == ("", "") and shown[-1] == ("1", "1")
    board = EventAccumulator(str(tmp_path / "board" / "version_0"))
    board.Reload()
    scalars = board.Scalars("byzantine/non_finite/worker_1")
    assert [(scalar.step, scalar.value) for scalar in scalars] == [(10, 10.0), (20, 20.0), (30, 30.0)]
    assert board.Scalars("byzantine/suspects")[-1].value == board.Scalars("byzantine/proved")[-1].value == 1
    for name in ("distance", "norm", "weight", "trimmed", "score"):
        assert f"byzantine/{name}/worker_0" in board.Tags()["scalars"]
    image = board.Images("byzantine/distances")[-1]
    assert (image.width, image.height) == (30, 36)
    assert "byzantine/suspects" in (tmp_path / "csv" / "version_0" / "metrics.csv").read_text()
    assert (tmp_path / "board" / "version_0" / "suspects.jsonl").exists()


class Keeping(CSVLogger):
    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        self.kept: list[dict[str, float]] = []

    def log_metrics(self, metrics: dict[str, Any], step: int | None = None) -> None:
        self.kept.append(metrics)


def logged_certificates(folder: Path, attack: Attack | None, **strategy: Any) -> list[tuple[float, float]]:
    """Return both bounds at every tenth step, NaN for those that are not logged."""
    logger, options = Keeping(folder), {"workers_per_process": 5, **strategy}
    fit_monitored(folder, attack, [3], options, num_batches=150, monitor={"every_n_steps": 10}, logger=logger)
    names = ("byzantine/certificate", "byzantine/certificate_if_suspects_lie")
    return [tuple(row.get(name, torch.nan) for name in names) for row in logger.kept if "byzantine/suspects" in row]


@pytest.mark.parametrize("fault", ["none", "x 10", "coordinate-wise"])
def test_logs_how_far_the_aggregate_can_be_from_the_honest_mean(one_rank: RankPool, tmp_path: Path, fault: str) -> None:
    attack = None if fault == "none" else Multiplied(10.0)
    strategy = {"aggregator": CoordinateWiseMedian()} if fault == "coordinate-wise" else {}
    (logged,) = one_rank.run(logged_certificates, tmp_path, attack, **strategy)
    bounds, without_suspects = zip(*logged, strict=True)
    assert len(logged) == 3
    assert all(map(isnan if fault == "coordinate-wise" else isfinite, bounds))
    if fault == "x 10":
        assert all(0 < apart < bound / 2 for bound, apart in logged[1:])  # from step 20 on, the worker is a suspect
    else:
        assert all(map(isnan, without_suspects))


@pytest.mark.slow
def test_a_picture_is_drawn_once_in_100_steps_at_most(one_rank: RankPool, tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    board = TensorBoardLogger(tmp_path)
    options = {"workers_per_process": 2, "aggregator": Mean()}
    one_rank.run(suspects_of_fit, tmp_path, strategy=options, num_batches=20, max_epochs=25, logger=board)
    events = EventAccumulator(str(tmp_path / "lightning_logs" / "version_0"))
    events.Reload()
    images = events.Images("byzantine/distances")
    assert [(image.step, image.width) for image in images] == [(100, 100), (200, 200), (250, 250)]


def fit_that_fails(folder: Path) -> None:
    with pytest.raises(ByzantineSuspectError):
        fit_monitored(
            folder,
            NonFinite(),
            [1],
            {"workers_per_process": 3},
            num_batches=30,
            monitor={"on_suspect": "raise"},
            logger=TensorBoardLogger(folder),
        )


def test_a_picture_is_drawn_when_a_suspect_ends_the_run(one_rank: RankPool, tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    one_rank.run(fit_that_fails, tmp_path)
    events = EventAccumulator(str(tmp_path / "lightning_logs" / "version_0"))
    events.Reload()
    assert [image.width for image in events.Images("byzantine/distances")] == [7]


def table_of_fit(folder: Path) -> str:
    records: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: records.append(record.getMessage())
    for name in ("lightning.pytorch", "lightning.pytorch.utilities.rank_zero"):
        logging.getLogger(name).addHandler(handler)
        logging.getLogger(name).setLevel(logging.INFO)
    try:
        fit_monitored(folder, NonFinite(), [1])
    finally:
        for name in ("lightning.pytorch", "lightning.pytorch.utilities.rank_zero"):
            logging.getLogger(name).removeHandler(handler)
    return next((record for record in records if record.startswith("ByzantineMonitor")), "")


def test_a_table_sums_up(three_ranks: RankPool, tmp_path: Path) -> None:
    table, *others = three_ranks.run(table_of_fit, tmp_path)
    assert others == ["", ""]
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in table.splitlines()[3:]]
    assert [row[0] for row in rows] == ["0", "1", "2"]
    assert rows[1][4:6] == ["100%", str(NUM_STEPS)] and rows[1][-1] == "proved: not finite"
    assert rows[0][-1] == ""


def count_collectives(folder: Path, with_monitor: bool, exchange: str) -> int:
    counted = [0]
    names = ["all_reduce", "all_gather_into_tensor", "all_gather_single", "all_to_all_single", "broadcast", "barrier"]
    names += ["gather", "all_gather", "broadcast_object_list", "all_gather_object", "reduce"]
    patches = []
    for name in names:
        function = getattr(torch.distributed, name, None)
        if function is not None:
            patches.append(mock.patch(f"torch.distributed.{name}", _counting(function, counted)))
    patches.append(
        mock.patch(
            "lightning_byzantine.exchange.collectives._all_gather",
            _counting(torch.distributed.all_gather_single, counted),
        )
    )
    started = CountFromHere(counted)
    monitor = [ByzantineMonitor()] if with_monitor else []
    for patch in patches:
        patch.start()
    try:
        fit(
            ByzantineDDPStrategy(exchange=exchange),
            callbacks=[*monitor, started],
            default_root_dir=folder,
        )
    finally:
        for patch in patches:
            patch.stop()
    return started.counted_in_steps


def _counting(function: Any, counted: list[int]) -> Any:
    def count(*args: Any, **kwargs: Any) -> Any:
        counted[0] += 1
        return function(*args, **kwargs)

    return count


class CountFromHere(pl.Callback):
    def __init__(self, counted: list[int]) -> None:
        self.counted = counted

    def on_train_start(self, *_: Any) -> None:
        self.before = self.counted[0]

    def on_train_end(self, *_: Any) -> None:
        self.counted_in_steps = self.counted[0] - self.before


@pytest.mark.parametrize("exchange", ["all_gather", "all_to_all"])
def test_no_step_communicates_more(three_ranks: RankPool, tmp_path: Path, exchange: str) -> None:
    alone, watched = (three_ranks.run(count_collectives, tmp_path, monitor, exchange) for monitor in (False, True))
    assert watched == alone
    assert alone[0] > 0


def test_misuse_is_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="on_suspect must be 'warn', 'raise', 'quarantine' or a function, got 'shout'"):
        ByzantineMonitor(on_suspect="shout")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="every_n_steps must be at least 1, got 0"):
        ByzantineMonitor(every_n_steps=0)
    with pytest.raises(ValueError, match="window must be at least 1, got 0"):
        ByzantineMonitor(window=0)
    with pytest.raises(ValueError, match="threshold must be finite and above 0, got 0"):
        ByzantineMonitor(threshold=0)
    for policy in ("warn", print):
        with pytest.raises(ValueError, match="punish_without_proof=True needs on_suspect='raise' or 'quarantine'"):
            ByzantineMonitor(on_suspect=policy, punish_without_proof=True)  # type: ignore[arg-type]
    runner = pl.Trainer(accelerator="cpu", devices=1, logger=False, callbacks=[ByzantineMonitor()])
    with pytest.raises(MisconfigurationException, match=r"needs strategy='byzantine_ddp'.*got SingleDeviceStrategy"):
        runner.fit(Regression())


def error_of_quarantine_in_shadow() -> str:
    with pytest.raises(MisconfigurationException) as caught:
        fit(ByzantineDDPStrategy(shadow=True), callbacks=[ByzantineMonitor(on_suspect="quarantine")])
    return str(caught.value)


def test_shadow_mode_does_not_quarantine(one_rank: RankPool) -> None:
    assert "shadow mode has none, got shadow=True" in one_rank.run(error_of_quarantine_in_shadow)[0]


def test_a_suspect_error_survives_pickling() -> None:
    error = pickle.loads(pickle.dumps(ByzantineSuspectError(3, "worker 3 is odd")))
    assert (error.worker, str(error)) == (3, "worker 3 is odd")
