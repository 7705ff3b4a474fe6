"""Finds the faulty worker."""

import json
from collections import deque
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import lightning.pytorch as pl
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.callbacks import ProgressBar
from lightning.pytorch.loggers import TensorBoardLogger
from lightning.pytorch.utilities import rank_zero_info, rank_zero_only, rank_zero_warn
from torch import Tensor
from torch.utils.hooks import RemovableHandle
from typing_extensions import override

from lightning_byzantine.aggregators.report import Report
from lightning_byzantine.errors import ByzantineSuspectError
from lightning_byzantine.exchange.identities import Identity, gather_identities
from lightning_byzantine.monitoring.evidence import Evidence
from lightning_byzantine.monitoring.suspect import Suspect
from lightning_byzantine.monitoring.heat_map import heat_map
from lightning_byzantine.monitoring.suspicion import Suspicion
from lightning_byzantine.strategies.byzantine_ddp import ByzantineDDPStrategy
from lightning_byzantine.utilities.checks import check_integer_at_least, check_positive

__all__ = ["ByzantineMonitor"]

_POLICIES = ("warn", "raise", "quarantine")
# Steps in one heat map, and between two of them: it takes milliseconds, which in short epochs would be felt.
_COLUMNS = 1000
_REDRAWN = 100


class ByzantineMonitor(pl.Callback):
    """Watches what the rule finds out about each worker, and names those that are persistently unlike the others.

    It looks at the statistics that the aggregation computed anyway, at the bits of a sample of columns in every tenth
    step, and at whose buffers and metrics are outvoted for not being finite. No pass over the gradients and no
    collective comes with it, but for one gathering of names when ``fit`` starts. All ranks come to the same
    conclusions. See :class:`~lightning_byzantine.monitoring.suspicion.Suspicion` for the score, and
    :class:`~lightning_byzantine.aggregators.Report` for what each rule tells.

    Logs through the Trainer's loggers, with i for a worker's index and its values in the last step:

    - ``byzantine/distance/worker_i``, ``byzantine/norm/worker_i``: as multiples of the median worker's
    - ``byzantine/weight/worker_i``: its part in the aggregate
    - ``byzantine/trimmed/worker_i``: in which part of the window it had none
    - ``byzantine/non_finite/worker_i``: in how many steps of the run its row could not be measured
    - ``byzantine/score/worker_i``: the score of suspicion, in units of the threshold
    - ``byzantine/suspects``, ``byzantine/quarantined``, ``byzantine/skipped_steps``: how many there are

    and, to TensorBoard, a picture ``byzantine/distances`` of workers and steps: at the end of an epoch, once in 100
    steps at the most, and when training ends, by an error too. The progress bar shows the suspects' indices.
    ``suspects.jsonl`` in the log directory has one line for every change: ``event`` ("suspected", "cleared" or
    "quarantined"), ``step``, and the fields of :class:`~lightning_byzantine.monitoring.Suspect`. At the end of
    ``fit`` a table sums up all workers.

    Args:
        on_suspect: what to do with a new suspect: "warn", "raise" an error on all ranks, "quarantine" it, which drops
            its rows from the next step on and lowers ``num_byzantine`` by one, or a function that is called with the
            :class:`~lightning_byzantine.monitoring.Suspect`, on every rank. No more than ``num_byzantine`` workers are
            put in quarantine.
        every_n_steps: how often to log scalars. None for the Trainer's ``log_every_n_steps``.
        window: how many steps the evidence is of.
        threshold: score from which on a worker is suspected. A bad worker adds up to 2 a step.

    Attributes:
        suspects: indices of the workers under suspicion now and of those in quarantine, on every rank.

    Raises:
        ValueError: if ``on_suspect`` is unknown, or a number out of range.
        MisconfigurationException: in ``setup``, if the strategy is not ``ByzantineDDPStrategy``, or it is in shadow
            mode and suspects are to be put in quarantine.

    Example:
        >>> monitor = ByzantineMonitor(on_suspect="quarantine")
        >>> trainer = pl.Trainer(
        ...     strategy="byzantine_ddp", accelerator="cpu", devices=5, callbacks=[monitor], logger=False
        ... )

    """

    def __init__(
        self,
        on_suspect: Literal["warn", "raise", "quarantine"] | Callable[[Suspect], Any] = "warn",
        every_n_steps: int | None = None,
        window: int = 100,
        threshold: float = 13.0,
    ) -> None:
        if on_suspect not in _POLICIES and not callable(on_suspect):
            raise ValueError(f"on_suspect must be 'warn', 'raise', 'quarantine' or a function, got {on_suspect!r}")
        if every_n_steps is not None:
            check_integer_at_least("every_n_steps", every_n_steps, 1)
        check_integer_at_least("window", window, 1)
        check_positive("threshold", threshold)
        self.on_suspect = on_suspect
        self.every_n_steps = every_n_steps
        self.window = window
        self.threshold = threshold
        self.suspects: list[int] = []
        self._reports: list[Report] = []
        self._columns: deque[tuple[list[float], list[bool]]] = deque(maxlen=_COLUMNS)
        self._new_columns = 0
        self._identities: list[Identity] = []
        self._path = Path()
        self._handle: RemovableHandle | None = None

    @override
    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        strategy = trainer.strategy
        if not isinstance(strategy, ByzantineDDPStrategy):
            raise MisconfigurationException(
                "ByzantineMonitor needs strategy='byzantine_ddp' or, to watch only, 'byzantine_ddp_shadow', got"
                f" {type(strategy).__name__}"
            )
        if strategy.shadow and self.on_suspect == "quarantine":
            raise MisconfigurationException(
                "on_suspect='quarantine' drops workers from the aggregation, and shadow mode has none, got shadow=True."
                " Use on_suspect='warn'."
            )
        if stage == "fit":
            self.suspects = []
            self._start_afresh(strategy.num_workers)

    @override
    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        strategy = _strategy(trainer)
        if strategy.world_size > 1:
            self._identities = gather_identities(strategy.root_device)
        else:
            self._identities = [Identity("localhost", str(strategy.root_device))]
        self._path = Path(trainer.log_dir or trainer.default_root_dir) / "suspects.jsonl"  # asks rank 0
        self._reports, self._columns, self._new_columns = [], deque(maxlen=_COLUMNS), 0
        self._handle = strategy.observe(self._reports.append)
        bar = trainer.progress_bar_callback
        if bar is not None:
            self._show_suspects(bar)

    @override
    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._list_suspects(_strategy(trainer))  # the quarantine is in the checkpoint

    @override
    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        strategy = _strategy(trainer)
        reports, weights = list(self._reports), None
        self._reports.clear()
        for report in reports:
            before = self._suspicion.suspected
            memory = 0.0 if strategy.estimator is None else strategy.estimator.memory
            self._suspicion.update(report, memory)
            self._evidence.update(report)
            self._columns.append((self._evidence.latest()[0], report.measurable.tolist()))
            self._new_columns += 1
            weights = report.weights
            for worker in sorted(before ^ self._suspicion.suspected):
                self._note(trainer, worker)
        self._list_suspects(strategy)
        every = self.every_n_steps or trainer.log_every_n_steps  # type: ignore[attr-defined]  # as its connector has it
        if weights is not None and every and trainer.global_step % every == 0:
            self._log(trainer, strategy, weights)

    @override
    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if self._new_columns >= _REDRAWN:
            self._draw(trainer)

    @override
    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if self._new_columns > 0:
            self._draw(trainer)

    @override
    def on_fit_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if self._evidence.steps > 0:
            rank_zero_info(self._table(_strategy(trainer)))

    @override
    def teardown(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        if self._handle is not None:
            self._handle.remove()
            self._handle = None
        if trainer.progress_bar_callback is not None:
            trainer.progress_bar_callback.__dict__.pop("get_metrics", None)

    @override
    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        self.on_train_end(trainer, pl_module)
        # Lightning does not tear callbacks down then.
        self.teardown(trainer, pl_module, "fit")

    @override
    def state_dict(self) -> dict[str, Any]:
        if "_suspicion" not in vars(self):
            return {}  # saved without a fit
        return {"suspicion": self._suspicion.state_dict(), "evidence": self._evidence.state_dict()}

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        if not state_dict:
            return
        try:
            self._suspicion.load_state_dict(state_dict["suspicion"])
            self._evidence.load_state_dict(state_dict["evidence"])
        except (KeyError, ValueError) as error:
            # Nothing half loaded.
            self._start_afresh(len(self._suspicion.scores))
            rank_zero_warn(f"ByzantineMonitor starts afresh, since what is in the checkpoint does not fit: {error!r}.")

    def _start_afresh(self, num_workers: int) -> None:
        self._suspicion = Suspicion(num_workers, self.threshold)
        self._evidence = Evidence(num_workers, self.window)

    def _suspect(self, strategy: ByzantineDDPStrategy, worker: int) -> Suspect:
        rank = worker * strategy.world_size // len(self._suspicion.scores)
        identity = self._identities[rank]
        evidence = self._evidence.of(worker)
        return Suspect(worker, rank, identity.host, identity.device, **evidence, shadow=strategy.shadow)

    def _note(self, trainer: pl.Trainer, worker: int) -> None:
        """Act on a worker that has come under suspicion, or is not any more."""
        strategy = _strategy(trainer)
        suspect = self._suspect(strategy, worker)
        if worker not in self._suspicion.suspected:
            self._write(trainer, "cleared", suspect)
            rank_zero_info(f"No longer under suspicion: {suspect}")
            return
        self._write(trainer, "suspected", suspect)
        if callable(self.on_suspect):
            self.on_suspect(suspect)
        elif self.on_suspect == "raise":
            raise ByzantineSuspectError(worker, str(suspect))
        else:
            rank_zero_warn(f"Under suspicion: {suspect}")
        if self.on_suspect == "quarantine":
            self._quarantine(trainer, strategy, suspect)

    def _quarantine(self, trainer: pl.Trainer, strategy: ByzantineDDPStrategy, suspect: Suspect) -> None:
        if len(strategy.quarantined) >= strategy.num_byzantine:
            rank_zero_warn(
                f"Did not quarantine worker {suspect.worker}: as many as num_byzantine={strategy.num_byzantine} are in"
                f" quarantine already, {sorted(strategy.quarantined)}. Look into these hosts."
            )
            return
        try:
            strategy.quarantine([suspect.worker])
        except ValueError as error:
            rank_zero_warn(f"Did not quarantine worker {suspect.worker}, which would leave the rule too few: {error}")
            return
        self._write(trainer, "quarantined", suspect)
        rank_zero_warn(f"Quarantined worker {suspect.worker}: its rows are dropped from the next step on.")

    def _list_suspects(self, strategy: ByzantineDDPStrategy) -> None:
        self.suspects = sorted(strategy.quarantined | self._suspicion.suspected)

    def _show_suspects(self, bar: ProgressBar) -> None:
        get_metrics = bar.get_metrics

        def with_suspects(*args: Any) -> dict[str, Any]:
            shown = {"suspects": ",".join(map(str, self.suspects))} if self.suspects else {}
            return {**get_metrics(*args), **shown}

        # On the instance, since `self.log` takes numbers only; see teardown.
        bar.__dict__["get_metrics"] = with_suspects

    def _log(self, trainer: pl.Trainer, strategy: ByzantineDDPStrategy, weights: Tensor) -> None:
        distances, norms = self._evidence.latest()
        values = {
            "distance": distances,
            "norm": norms,
            "weight": weights.tolist(),
            "trimmed": self._evidence.trimmed_part(),
            "non_finite": self._evidence.non_finite,
            "score": [score / self.threshold for score in self._suspicion.scores],
        }
        metrics = {
            f"byzantine/{name}/worker_{worker}": value
            for name, row in values.items()
            for worker, value in enumerate(row)
            if value == value  # unknown ones are NaN
        }
        metrics["byzantine/suspects"] = len(self.suspects)
        metrics["byzantine/quarantined"] = len(strategy.quarantined)
        metrics["byzantine/skipped_steps"] = strategy.skipped_steps
        for logger in trainer.loggers:
            logger.log_metrics(metrics, step=trainer.global_step)

    @rank_zero_only
    def _draw(self, trainer: pl.Trainer) -> None:
        self._new_columns = 0
        image = heat_map(*zip(*self._columns, strict=True))
        for logger in trainer.loggers:
            if isinstance(logger, TensorBoardLogger):
                logger.experiment.add_image("byzantine/distances", image, trainer.global_step)

    @rank_zero_only
    def _write(self, trainer: pl.Trainer, event: str, suspect: Suspect) -> None:
        self._path.parent.mkdir(parents=True, exist_ok=True)
        with self._path.open("a") as file:
            file.write(json.dumps({"event": event, "step": trainer.global_step, **suspect.as_dict()}) + "\n")

    def _table(self, strategy: ByzantineDDPStrategy) -> str:
        steps = self._evidence.steps
        lines = [
            f"ByzantineMonitor, {steps} steps, num_byzantine={strategy.num_byzantine}"
            + (", shadow mode" if strategy.shadow else ""),
            "| worker | rank | host | device | trimmed | non-finite | distance | norm | verdict |",
            "|---|---|---|---|---|---|---|---|---|",
        ]
        for worker in range(len(self._suspicion.scores)):
            suspect = self._suspect(strategy, worker)
            verdict = "suspect" if worker in self.suspects else ""
            lines.append(
                f"| {worker} | {suspect.rank} | {suspect.host} | {suspect.device}"
                f" | {'' if suspect.trimmed is None else f'{self._evidence.trimmed[worker] / steps:.0%}'}"
                f" | {self._evidence.non_finite[worker]} | {_show(suspect.distance)} | {_show(suspect.norm)}"
                f" | {'quarantined' if worker in strategy.quarantined else verdict} |"
            )
        return "\n".join(lines)


def _strategy(trainer: pl.Trainer) -> ByzantineDDPStrategy:
    assert isinstance(trainer.strategy, ByzantineDDPStrategy)  # see setup
    return trainer.strategy


def _show(multiple: float | None) -> str:
    return "" if multiple is None else f"{multiple:.2f}"
