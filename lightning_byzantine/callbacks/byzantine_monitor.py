"""Finds the faulty worker."""

from collections.abc import Callable, Collection
from contextlib import ExitStack
from pathlib import Path
from typing import Any, Literal, get_args

import lightning.pytorch as pl
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.loggers import TensorBoardLogger
from lightning.pytorch.utilities import rank_zero_info, rank_zero_only, rank_zero_warn
from typing_extensions import override

from lightning_byzantine.aggregators.report import Report
from lightning_byzantine.callbacks.expulsion import expel
from lightning_byzantine.errors import ByzantineSuspectError
from lightning_byzantine.exchange.identities import Identity, gather_identities
from lightning_byzantine.monitoring.audit_order import audit_order
from lightning_byzantine.monitoring.audit_schedule import Audited, AuditSchedule
from lightning_byzantine.monitoring.crowding import Crowding
from lightning_byzantine.monitoring.evidence import Evidence
from lightning_byzantine.monitoring.heat_map import HeatMap
from lightning_byzantine.monitoring.proofs import Proofs
from lightning_byzantine.monitoring.suspect import Suspect
from lightning_byzantine.monitoring.suspect_log import Event, log_suspect
from lightning_byzantine.monitoring.suspicion import Suspicion
from lightning_byzantine.monitoring.worker_table import worker_table
from lightning_byzantine.strategies.audits.verdict import Outcome, Verdict
from lightning_byzantine.strategies.robust_strategy import RobustStrategy
from lightning_byzantine.utilities.checks import check_choice, check_integer_at_least
from lightning_byzantine.utilities.replacing import replaced

__all__ = ["ByzantineMonitor"]

_PUNISHMENTS = ("raise", "quarantine")
_POLICIES = ("warn", *_PUNISHMENTS)
_FLOAT16 = ("16-mixed", "16-true", "transformer-engine-float16")
# Minimum number of steps between two pictures: one takes milliseconds, which would slow down short epochs.
_REDRAWN = 100


class ByzantineMonitor(pl.Callback):
    """Monitors statistics of each worker, and names workers that persistently differ from the others.

    Whoever differs is under suspicion: it may be faulty, or an honest worker with unusual data, or one that liars make
    look odd. Only what does not depend on the others' rows is a proof; see
    :class:`~lightning_byzantine.monitoring.proofs.Proofs`. Nobody is punished without.

    It uses statistics that the aggregation computes anyway, and which processes were outvoted for non-finite buffers
    and metrics. That needs no pass over the gradients and no
    collective, except to gather the hosts' names when ``fit`` starts. All ranks come to the same conclusions. See
    :class:`~lightning_byzantine.monitoring.suspicion.Suspicion` for the score, and
    :class:`~lightning_byzantine.aggregators.Report` for the statistics of each rule.

    It also has workers audited: all other ranks compute a worker's step once more and compare it with what the worker
    has sent. This proves that it computes wrongly, or clears it. The other ranks get its batch of that step. See
    :meth:`~lightning_byzantine.ByzantineDDPStrategy.audit`, and
    :class:`~lightning_byzantine.monitoring.audit_schedule.AuditSchedule` for when.

    Logs to the Trainer's loggers, for worker i in the last step:

    - ``byzantine/distance/worker_i``, ``byzantine/norm/worker_i``: as multiples of the median worker's
    - ``byzantine/weight/worker_i``: its weight in the aggregate, on average over the columns
    - ``byzantine/trimmed/worker_i``: the fraction of the window's steps in which it did not contribute; a step in which
      it was left out in some parameters counts by their fraction of all columns
    - ``byzantine/non_finite/worker_i``: the number of steps of the run in which its row could not be measured
    - ``byzantine/score/worker_i``: the score of suspicion, in units of the threshold
    - ``byzantine/certificate``: upper bound of the distance between the aggregate and the honest workers' mean, in the
      unit of the vectors that workers send, if no more than ``num_byzantine`` workers are Byzantine, including those in
      quarantine; see :meth:`~lightning_byzantine.aggregators.Report.certificate`. Not logged for rules that don't know
      distances from the aggregate
    - ``byzantine/certificate_if_suspects_lie``: the same if all suspects are Byzantine as well; logged while there are
      any
    - ``byzantine/suspects``, ``byzantine/proved``, ``byzantine/quarantined``, ``byzantine/skipped_steps``: how many
      there are

    and, to TensorBoard, a picture ``byzantine/distances`` of workers and steps: at the end of an epoch, at most once in
    100 steps, and when training ends, even by an error. The progress bar shows the indices of ``suspects``, and which
    of them are ``proved``.
    ``suspects.jsonl`` in the log directory has one line for everything that becomes known: ``event`` ("suspected",
    "cleared", "audited", "proved" or "quarantined"), ``step``, and the fields of
    :class:`~lightning_byzantine.monitoring.Suspect`. At the end of ``fit`` a table sums up all workers.

    Args:
        on_suspect: what to do with a worker that is proved to be faulty: "warn", "raise" an error on all ranks,
            "quarantine" it, which drops its rows from the next step on and lowers ``num_byzantine`` by one, or a
            function that is called with the :class:`~lightning_byzantine.monitoring.Suspect`, on every rank. At most
            ``num_byzantine`` workers are put in quarantine. Of a worker under suspicion, there is a warning only; a
            function is called then, and again if there is proof later.
        every_n_steps: how often to log scalars. None for the Trainer's ``log_every_n_steps``.
        window: number of steps that the evidence is from.
        threshold: score from which a worker is suspected. A bad worker adds up to 2 a step.
        punish_without_proof: "raise" or "quarantine" when there is suspicion only. Where the suspect is an honest
            worker, framed by liars or with data of its own kind, the liars gain: ``num_byzantine`` stays as it is while
            the number of honest workers falls.
        audit: whom to audit: "suspects" as they appear, "turns" for all workers in turn, "all" for both, None for
            nobody. "auto" for "all" where it can be done; elsewhere, such as in manual optimization, for nobody, with a
            warning that says why.
        audit_every_n_steps: number of steps between two turns. In the first round they are closer, so that each worker
            has its turn within this number of steps, but at least 50 apart.

    Attributes:
        suspects: indices of the workers under suspicion now, of those proved to be faulty and of those in quarantine,
            on every rank.

    Raises:
        ValueError: if ``on_suspect`` is unknown, or a number out of range, or ``punish_without_proof`` is given with
            an ``on_suspect`` that does not punish.
        MisconfigurationException: in ``setup``, if the strategy is not one of this package, or is in shadow mode
            with ``on_suspect="quarantine"``, or if ``audit`` asks for audits where workers can't be audited.

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
        punish_without_proof: bool = False,
        audit: Audited | Literal["auto"] | None = "auto",
        audit_every_n_steps: int = 500,
    ) -> None:
        if on_suspect not in _POLICIES and not callable(on_suspect):
            raise ValueError(f"on_suspect must be 'warn', 'raise', 'quarantine' or a function, got {on_suspect!r}")
        if every_n_steps is not None:
            check_integer_at_least("every_n_steps", every_n_steps, 1)
        if punish_without_proof and on_suspect not in _PUNISHMENTS:
            raise ValueError(
                f"punish_without_proof=True needs on_suspect='raise' or 'quarantine', got on_suspect={on_suspect!r}"
            )
        if audit is not None:
            check_choice("audit", audit, ("auto", *get_args(Audited)))
        self.on_suspect = on_suspect
        self.audit = audit
        self.audit_every_n_steps = check_integer_at_least("audit_every_n_steps", audit_every_n_steps, 1)
        self.punish_without_proof = punish_without_proof
        self.every_n_steps = every_n_steps
        self.window = window
        self.threshold = threshold
        self.suspects: list[int] = []
        self._audited: Audited | None = None
        self._start_afresh(num_workers=0)
        self._heat_map = HeatMap()
        self._reports: list[Report] = []
        self._verdicts: list[Verdict] = []
        self._identities: list[Identity] = []
        self._log_path = Path()
        self._until_teardown = ExitStack()

    def __getstate__(self) -> dict[str, Any]:
        # What ends at teardown can't be copied, and is not the copy's to end.
        return vars(self) | {"_until_teardown": ExitStack()}

    @override
    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        strategy = trainer.strategy
        if not isinstance(strategy, RobustStrategy):
            raise MisconfigurationException(
                "ByzantineMonitor needs strategy='byzantine_ddp', 'byzantine_fsdp' or, to watch only,"
                " 'byzantine_ddp_shadow', got"
                f" {type(strategy).__name__}"
            )
        if strategy.shadow and self.on_suspect == "quarantine":
            raise MisconfigurationException(
                "on_suspect='quarantine' drops workers from the aggregation, and shadow mode has none, got shadow=True."
                " Use on_suspect='warn'."
            )
        if stage == "fit":
            self.suspects = []
            self._audited = self._possible_audits(strategy)
            self._start_afresh(strategy.num_workers)

    @override
    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        strategy = _strategy(trainer)
        if strategy.world_size > 1:
            self._identities = gather_identities(strategy.root_device)
        else:
            self._identities = [Identity("localhost", str(strategy.root_device))]
        folder = trainer.log_dir or trainer.default_root_dir  # log_dir is broadcast from rank 0
        self._log_path = Path(folder) / "suspects.jsonl"
        self._heat_map = HeatMap()
        self._reports.clear()
        self._verdicts.clear()
        self._until_teardown.callback(strategy.observe(self._reports.append).remove)
        self._until_teardown.callback(strategy.observe_verdicts(self._verdicts.append).remove)
        bar = trainer.progress_bar_callback
        if bar is not None:
            # `self.log` could not show a list of indices: it takes numbers only.
            showing = replaced(bar, get_metrics=self._with_suspects(bar.get_metrics))
            self._until_teardown.enter_context(showing)

    @override
    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        strategy = _strategy(trainer)
        if self.on_suspect == "quarantine":
            # The proofs in the checkpoint may be of a run that only warned.
            for worker in sorted(self._proofs.proofs.keys() - strategy.quarantined):
                self._expel(trainer, self._suspect(strategy, worker))
        self._list_suspects(strategy)  # the quarantine is in the checkpoint

    @override
    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        strategy, suspected = _strategy(trainer), self._suspicion.suspected
        reports = self._reports.copy()
        self._reports.clear()
        for report in reports:
            self._judge(trainer, report)
        verdicts = self._verdicts.copy()
        self._verdicts.clear()
        for verdict in verdicts:
            self._take(trainer, verdict)
        self._list_suspects(strategy)
        if reports:
            self._announce_audits(trainer, self._suspicion.suspected - suspected)
        every = self.every_n_steps or trainer.log_every_n_steps  # type: ignore[attr-defined]  # as its connector has it
        if reports and every and trainer.global_step % every == 0:
            scores = [score / self.threshold for score in self._suspicion.scores]
            metrics = self._evidence.scalars(reports[-1].weights.tolist(), scores) | {
                "byzantine/suspects": len(self.suspects),
                "byzantine/proved": len(self._proofs.proofs),
                "byzantine/quarantined": len(strategy.quarantined),
                "byzantine/skipped_steps": strategy.skipped_steps,
            }
            metrics |= self._certificates(reports[-1])
            for logger in trainer.loggers:
                logger.log_metrics(metrics, step=trainer.global_step)

    @override
    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if self._heat_map.new_steps >= _REDRAWN:
            self._draw(trainer)

    @override
    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if self._heat_map.new_steps > 0:
            self._draw(trainer)

    @override
    def on_fit_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if self._evidence.steps > 0:
            strategy = _strategy(trainer)
            workers = [self._suspect(strategy, worker) for worker in range(strategy.num_workers)]
            rank_zero_info(
                worker_table(workers, self._evidence, strategy.num_byzantine, self.suspects, strategy.quarantined)
            )

    @override
    def teardown(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        self._until_teardown.close()

    @override
    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        self.on_train_end(trainer, pl_module)
        # Lightning does not tear callbacks down after an exception.
        self.teardown(trainer, pl_module, "fit")

    @override
    def state_dict(self) -> dict[str, Any]:
        if not self._suspicion.scores:
            return {}  # saved without a fit
        return {name: part.state_dict() for name, part in self._parts().items()}

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        if not state_dict:
            return
        try:
            for name, part in self._parts().items():
                part.load_state_dict(state_dict[name])
        except (KeyError, ValueError) as error:
            # The first ones may have been loaded.
            self._start_afresh(len(self._suspicion.scores))
            rank_zero_warn(
                f"ByzantineMonitor starts from zero, since its state in the checkpoint does not fit: {error!r}."
            )

    def _start_afresh(self, num_workers: int) -> None:
        self._suspicion = Suspicion(num_workers, self.threshold)
        self._evidence = Evidence(num_workers, self.window)
        self._proofs = Proofs(num_workers, self.threshold)
        self._crowding = Crowding(num_workers)
        self._schedule = AuditSchedule(self._audited, self.audit_every_n_steps)

    def _parts(self) -> dict[str, Suspicion | Evidence | Proofs | Crowding | AuditSchedule]:
        """Return everything that goes into a checkpoint, by its name there."""
        return {
            "suspicion": self._suspicion,
            "evidence": self._evidence,
            "proofs": self._proofs,
            "crowding": self._crowding,
            "audits": self._schedule,
        }

    def audit_order(self, trainer: pl.Trainer) -> list[int]:
        """Return the workers that are neither proved to be faulty nor in quarantine, in the order to audit them.

        The same on every rank; see :func:`~lightning_byzantine.monitoring.audit_order.audit_order`.
        """
        return audit_order(
            [score / self.threshold for score in self._suspicion.scores],
            self._crowding.averages,
            self._proofs.num_audits,
            cleared=self._suspicion.cleared,
            excluded=_strategy(trainer).quarantined | self._proofs.proofs.keys(),
        )

    def _possible_audits(self, strategy: RobustStrategy) -> Audited | None:
        if self.audit is None:
            return None
        try:
            strategy.check_audits()
        except MisconfigurationException as error:
            if self.audit != "auto":
                raise
            rank_zero_warn(f"ByzantineMonitor has nobody audited in this run. {error} audit=None is without a warning.")
            return None
        return "all" if self.audit == "auto" else self.audit

    def _announce_audits(self, trainer: pl.Trainer, suspects: Collection[int]) -> None:
        order, num_audits = self.audit_order(trainer), self._proofs.num_audits
        suspected = [worker for worker in order if worker in suspects]
        for worker in self._schedule.announced(trainer.global_step, suspected, order, num_audits):
            _strategy(trainer).audit(worker)

    def _take(self, trainer: pl.Trainer, verdict: Verdict) -> None:
        """Act on the outcome of an audit."""
        worker, was_suspected = verdict.worker, verdict.worker in self._suspicion.suspected
        is_proof = self._proofs.audited(worker, verdict.outcome)
        if verdict.outcome == Outcome.RIGHTLY:
            self._suspicion.clear(worker)
        suspect = self._suspect(_strategy(trainer), worker)
        self._write(trainer, "audited", suspect)
        rank_zero_info(f"Audited: {verdict}")
        if is_proof:
            self._act(trainer, suspect, "proved")
        elif was_suspected and worker not in self._suspicion.suspected:
            self._dismiss(trainer, suspect)

    def _judge(self, trainer: pl.Trainer, report: Report) -> None:
        """Add one step's report, and act on the workers whose suspicion it changes."""
        estimator = _strategy(trainer).estimator
        before = self._suspicion.suspected
        self._suspicion.update(report, memory=0.0 if estimator is None else estimator.memory)
        self._evidence.update(report)
        self._crowding.update(report)
        overflows = _strategy(trainer).precision_plugin.precision in _FLOAT16
        proved = self._proofs.update(report, overflows=overflows)
        distances, _ = self._evidence.latest()
        self._heat_map.add(distances, report.measurable.tolist())
        for worker in sorted((before ^ self._suspicion.suspected).union(proved)):
            suspect = self._suspect(_strategy(trainer), worker)
            if worker in proved:
                self._act(trainer, suspect, "proved")
            elif worker in self._proofs.proofs:
                continue  # what is proved is not suspected again, nor cleared
            elif worker in self._suspicion.suspected:
                self._act(trainer, suspect, "suspected")
            else:
                self._dismiss(trainer, suspect)

    def _certificates(self, report: Report) -> dict[str, float]:
        """Return what to log by name."""
        bounds = {"byzantine/certificate": report.certificate()}
        liars = self._suspicion.suspected | self._proofs.proofs.keys()
        if liars:
            bounds["byzantine/certificate_if_suspects_lie"] = report.certificate(liars)
        return {name: bound for name, bound in bounds.items() if bound is not None}

    def _suspect(self, strategy: RobustStrategy, worker: int) -> Suspect:
        ranks = strategy.ranks_of(worker)
        identities = [self._identities[rank] for rank in ranks]
        evidence = self._evidence.of(worker)
        return Suspect(
            worker,
            ranks.start,
            ", ".join(dict.fromkeys(identity.host for identity in identities)),
            ", ".join(dict.fromkeys(identity.device for identity in identities)),
            **evidence,
            shadow=strategy.shadow,
            proof=self._proofs.proofs.get(worker),
            verdict=self._proofs.verdicts.get(worker),
            num_ranks=len(ranks),
        )

    def _act(self, trainer: pl.Trainer, suspect: Suspect, event: Literal["suspected", "proved"]) -> None:
        """Do what ``on_suspect`` says with a new suspect, or with one that is now proved to be faulty."""
        self._write(trainer, event, suspect)
        is_punished = event == "proved" or self.punish_without_proof
        if callable(self.on_suspect):
            self.on_suspect(suspect)
        elif self.on_suspect == "raise" and is_punished:
            raise ByzantineSuspectError(suspect.worker, str(suspect))
        else:
            rank_zero_warn(f"{'Proved to be faulty' if event == 'proved' else 'Under suspicion'}: {suspect}")
        if self.on_suspect == "quarantine" and is_punished:
            self._expel(trainer, suspect)

    def _expel(self, trainer: pl.Trainer, suspect: Suspect) -> None:
        if expel(_strategy(trainer), suspect.worker, proved=suspect.proof is not None):
            self._write(trainer, "quarantined", suspect)

    def _dismiss(self, trainer: pl.Trainer, suspect: Suspect) -> None:
        self._write(trainer, "cleared", suspect)
        rank_zero_info(f"No longer under suspicion: {suspect}")

    def _list_suspects(self, strategy: RobustStrategy) -> None:
        self.suspects = sorted(strategy.quarantined | self._suspicion.suspected | self._proofs.proofs.keys())

    def _with_suspects(self, get_metrics: Callable[..., dict[str, Any]]) -> Callable[..., dict[str, Any]]:
        def with_suspects(*args: Any) -> dict[str, Any]:
            lists = {"suspects": self.suspects, "proved": sorted(self._proofs.proofs)}
            shown = {name: ",".join(map(str, workers)) for name, workers in lists.items() if workers}
            return {**get_metrics(*args), **shown}

        return with_suspects

    @rank_zero_only
    def _draw(self, trainer: pl.Trainer) -> None:
        image = self._heat_map.draw()
        for logger in trainer.loggers:
            if isinstance(logger, TensorBoardLogger):
                logger.experiment.add_image("byzantine/distances", image, trainer.global_step)

    @rank_zero_only
    def _write(self, trainer: pl.Trainer, event: Event, suspect: Suspect) -> None:
        log_suspect(self._log_path, event, trainer.global_step, suspect)


def _strategy(trainer: pl.Trainer) -> RobustStrategy:
    assert isinstance(trainer.strategy, RobustStrategy)  # see setup
    return trainer.strategy
