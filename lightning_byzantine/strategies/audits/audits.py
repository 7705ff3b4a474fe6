"""Audits: a worker's step, computed once more by all other ranks."""

from collections import deque
from collections.abc import Callable, Collection, Iterable, Sequence
from contextlib import AbstractContextManager, nullcontext
from hashlib import sha256
from inspect import signature

import lightning.pytorch as pl
import torch
import torch.distributed as dist
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.utilities.model_helpers import is_overridden
from torch import Tensor, nn

from lightning_byzantine.aggregation.engine import AggregationEngine
from lightning_byzantine.aggregation.gradient_block import GradientBlock
from lightning_byzantine.estimators import Estimator
from lightning_byzantine.matrix import WorkerMatrix
from lightning_byzantine.optim import DoubleMomentum, DoubleMomentumEstimator
from lightning_byzantine.strategies.accumulation_window import AccumulationWindow
from lightning_byzantine.strategies.audits import parcel
from lightning_byzantine.strategies.audits.captured_step import CapturedBatch, UnsupportedBatchError, captured
from lightning_byzantine.strategies.audits.replay import Gradients, NotReplayableError, Replay
from lightning_byzantine.strategies.audits.residual import Residual
from lightning_byzantine.strategies.audits.sent_rows import SentRow, SentRows
from lightning_byzantine.strategies.audits.statement import Finding, Judgement, Statement, digest, judged, sketched
from lightning_byzantine.strategies.audits.verdict import Outcome, Verdict
from lightning_byzantine.strategies.audits.window import AuditWindow, draw_nonce

__all__ = ["Audits", "check_auditable"]


def check_auditable(module: pl.LightningModule, num_workers: int) -> None:
    """Raise unless a worker's step can be computed once more.

    Args:
        module: the module to train.
        num_workers: number of workers, m.

    Raises:
        MisconfigurationException: if the module optimizes manually, fetches its own batches, overrides ``backward`` or
            contains SyncBatchNorm, or if there is a single worker.

    """
    problem = ""
    if num_workers == 1:
        problem = "other workers, got a single one"
    elif not module.automatic_optimization:
        problem = "automatic optimization, got automatic_optimization=False"
    elif "dataloader_iter" in signature(module.training_step).parameters:
        problem = "the batch of a step, got a `training_step(dataloader_iter)` that fetches its own"
    elif is_overridden("backward", module):
        problem = f"the loss that `training_step` returns, got an overridden `{type(module).__name__}.backward`"
    elif any(isinstance(part, nn.SyncBatchNorm) for part in module.modules()):
        problem = "a `training_step` without communication, got SyncBatchNorm"
    if problem:
        raise MisconfigurationException(f"Audits compute a worker's step once more, which needs {problem}.")


class Audits:
    """Audits workers, one after the other, each in a window of some steps.

    In the audit's step, after all gradients were exchanged and before the optimizer's step, the worker's rank sends
    its batches and its random state to all other ranks. Each computes the worker's gradient at the same parameters,
    and states how far it is from what it has received from the worker before.

    All methods must be called on all ranks alike.

    Args:
        module: the module to train.
        engine: exchanges the gradients.
        window: which worker a batch belongs to.
        estimator: what workers send; None for their gradients.
        num_byzantine: number of ranks that may be Byzantine, f.
        is_sharded: whether every rank receives other columns of the rows.
        optimizer: the one with the previous query point, under double momentum; None otherwise.
        max_norm: of a worker's gradient; None for no clipping.
        loss_scale: returns the factor on the loss; None without a gradient scaler.
        gather: returns the tensors of all ranks, the same on all honest ones, without those proved to be faulty.
        quarantined: returns the workers whose rows are dropped.
        tell: called with every verdict.

    """

    def __init__(
        self,
        module: pl.LightningModule,
        engine: AggregationEngine,
        window: AccumulationWindow,
        estimator: Estimator | None,
        num_byzantine: int,
        is_sharded: bool,
        optimizer: DoubleMomentum | None,
        max_norm: float | None,
        loss_scale: Callable[[], float | None],
        gather: Callable[[Tensor], dict[int, Tensor]],
        quarantined: Callable[[], Collection[int]],
        tell: Callable[[Verdict], None],
    ) -> None:
        self._module = module
        self._engine = engine
        self._accumulation = window
        self._estimator = estimator
        self._num_byzantine = num_byzantine
        self._is_sharded = is_sharded
        self._optimizer = optimizer
        self._max_norm = max_norm
        self._loss_scale = loss_scale
        self._gather = gather
        self._quarantined = quarantined
        self._tell = tell
        self._rank, self._num_ranks = dist.get_rank(), dist.get_world_size()
        self._num_local = window.num_local_workers
        # Gloo sends CPU tensors only.
        self._device = torch.device("cpu") if dist.get_backend() == "gloo" else module.device
        self._queue: deque[int] = deque()
        self._num_windows = 0
        self._window: AuditWindow | None = None
        self._rows: SentRows | None = None
        self._has_arrived = False
        self._batches: dict[int, CapturedBatch | UnsupportedBatchError] = {}
        self._has_reproduced = False
        self._tried: set[int] = set()
        engine.observe_rows(self._keep_row)

    def announce(self, worker: int) -> None:
        """Audit a worker in one of the next steps, or after those that were announced before."""
        if worker not in self._queue and (self._window is None or self._window.worker != worker):
            self._queue.append(worker)

    def captured(self) -> AbstractContextManager[None]:
        """Within the block, keep what the training step gets, if its worker may be audited in this step."""
        position = self._accumulation.position
        if position == 0:
            self._batches.clear()
            if self._window is None and self._queue:
                self._open(self._queue.popleft())
        if self._window is None or position % self._num_local != self._window.worker % self._num_local:
            return nullcontext()

        def keep(batch: CapturedBatch | UnsupportedBatchError) -> None:
            self._batches[position] = batch

        return captured(self._module, keep)

    @property
    def is_due(self) -> bool:
        """Whether the gradients of a step in a window have been exchanged, so that :meth:`step` is to be called."""
        return self._has_arrived

    def step(self) -> None:
        """Audit the window's worker if the draw says so."""
        window, rows = self._window, self._rows
        assert window is not None
        assert rows is not None
        self._has_arrived = False
        nonces = {rank: int(nonce) for rank, nonce in self._gather(draw_nonce()).items()}
        auditors = self._auditors(window.worker, nonces)
        if not auditors or window.is_drawn([nonces[rank] for rank in auditors]):
            self._audit(window.worker, rows, nonces)
            self._window = self._rows = None
            self._batches.clear()

    def _open(self, worker: int) -> None:
        self._window = AuditWindow(worker, self._num_windows)
        self._rows = SentRows(worker, self._is_sharded)
        self._num_windows += 1

    def _auditors(self, worker: int, ranks: Iterable[int]) -> list[int]:
        # A single process is its own auditor.
        return [rank for rank in ranks if rank != self._rank_of(worker) or self._num_ranks == 1]

    def _rank_of(self, worker: int) -> int:
        return worker // self._num_local

    def _keep_row(self, blocks: Sequence[GradientBlock], matrix: WorkerMatrix) -> None:
        if self._rows is not None:
            estimator, step = self._estimator, self._engine.num_aggregated
            self._rows.add(blocks, matrix, estimator.step if isinstance(estimator, DoubleMomentumEstimator) else step)
            self._has_arrived = True

    def _audit(self, worker: int, rows: SentRows, nonces: dict[int, int]) -> None:
        assert rows.current is not None
        sent = rows.current.completed(self._device)
        last = None if rows.last is None else rows.last.completed(self._device)
        own = self._statement(worker, sent, last, _seed(nonces)).packed()
        digests = self._gather(digest(own))
        packed = {rank: row for rank, row in self._gather(own).items() if rank in digests}
        statements = {
            rank: Statement.unpacked(packed[rank]) if digest(packed[rank]).equal(digests[rank]) else Statement()
            for rank in self._auditors(worker, packed)
        }
        num_byzantine = self._num_byzantine_of(len(packed))
        judgement = judged(statements, num_byzantine)
        self._note_whether_steps_repeat(judgement, self._rank_of(worker), num_byzantine)
        if judgement.outcome == Outcome.INCONCLUSIVE and judgement.unproved and self._try_another(worker):
            return
        self._tell(
            Verdict(
                worker,
                self._module.trainer.global_step,
                judgement.outcome,
                judgement.reason,
                judgement.wrong,
                len(judgement.right),
                judgement.residual,
                judgement.tolerance,
            )
        )

    def _num_byzantine_of(self, num_voters: int) -> int:
        """Return how many of the ranks that vote may be Byzantine."""
        if self._num_ranks == 1:
            return 0
        # Those who have lost their vote are some of the f. Even with f = 0 the device of one rank may be faulty, and
        # must not be able to prove that of another faulty alone.
        return max(1, self._num_byzantine - (self._num_ranks - num_voters))

    def _note_whether_steps_repeat(self, judgement: Judgement, audited: int, num_byzantine: int) -> None:
        def is_known(ranks: frozenset[int]) -> bool:
            # An honest rank that was audited knows what the auditors have found.
            return self._rank in ranks or (self._rank == audited and len(ranks) > num_byzantine)

        if is_known(judgement.reproduced):
            self._has_reproduced = True
        elif is_known(judgement.scattered):
            # Steps don't repeat exactly, so that one may have seemed to by chance.
            self._has_reproduced = False

    def _try_another(self, worker: int) -> bool:
        """Audit another worker first, to see whether any step can be recomputed; return whether there is one left."""
        self._tried.add(worker)
        num_workers = self._num_ranks * self._num_local
        following = ((worker + distance) % num_workers for distance in range(1, num_workers))
        passed = self._tried.union(self._quarantined())
        other = next((candidate for candidate in following if candidate not in passed), None)
        if other is None:
            return False
        self._tried.add(other)
        if other in self._queue:
            self._queue.remove(other)
        self._queue.extendleft([worker, other])
        return True

    def _statement(self, worker: int, sent: SentRow, last: SentRow | None, seed: int) -> Statement:
        batches, finding = self._exchanged(worker)
        is_usable = sent.is_usable and (self._estimator is None or (last is not None and last.is_usable))
        if not is_usable and finding == Finding.RECOMPUTED:
            finding = Finding.UNUSABLE
        if not self._have_enough_to_compute(worker, finding):
            return Statement(Finding.NOTHING if finding == Finding.RECOMPUTED else finding, self._has_reproduced)
        # On all ranks, whatever they have: in a collective of the user's, others would wait for those that are missing.
        gradients = self._replayed(batches)
        if finding != Finding.RECOMPUTED:
            return Statement(finding, self._has_reproduced)
        if isinstance(gradients, Finding):
            return Statement(gradients, self._has_reproduced)
        residual = Residual.of(sent, last, gradients, self._estimator)
        if residual is None:
            return Statement(Finding.UNUSABLE)
        num_owners, most = (self._num_ranks, self._num_byzantine) if self._is_sharded else (1, 0)
        norm, sketch = residual.norm(num_owners, most), sketched(residual.blocks, seed)
        if not sketch.isfinite().all():
            return Statement(Finding.FAILED, self._has_reproduced)
        return Statement(finding, self._has_reproduced, norm, residual.scale, residual.rounding, sketch)

    def _have_enough_to_compute(self, worker: int, finding: Finding) -> bool:
        """Return whether anything can follow; the same on all ranks."""
        can_compute = self._gather(torch.tensor([int(finding == Finding.RECOMPUTED)]))
        auditors = self._auditors(worker, can_compute)
        num_byzantine = self._num_byzantine_of(len(can_compute))
        return sum(int(can_compute[rank]) == 1 for rank in auditors) > num_byzantine

    def _replayed(self, batches: list[CapturedBatch]) -> Gradients | Finding:
        num_batches = self._accumulation.batches_of_a_worker
        try:
            replay = Replay(self._module, self._optimizer, self._max_norm, num_batches, self._loss_scale())
            return replay.gradients(batches)
        except (NotReplayableError, MisconfigurationException):
            return Finding.NOT_REPLAYABLE
        except (torch.OutOfMemoryError, MemoryError):
            return Finding.OUT_OF_MEMORY
        except Exception:
            return Finding.FAILED  # whatever the training step raises on this batch

    def _exchanged(self, worker: int) -> tuple[list[CapturedBatch], Finding]:
        """Return the worker's batches on ranks that got and accepted them, this rank's own on others, and a finding."""
        kept = [self._batches[position] for position in sorted(self._batches)]
        own = [batch for batch in kept if isinstance(batch, CapturedBatch)]
        is_complete = len(own) == len(kept)
        content, fixed = _content(own)
        kind = "\n".join(batch.kind for batch in own)
        if self._num_ranks == 1:
            return own, Finding.RECOMPUTED if is_complete else Finding.OTHER_STRUCTURE
        if self._rank == self._rank_of(worker):
            parcel.send(content if is_complete else None, kind, self._device)
            return own, Finding.NOTHING
        try:
            source = self._rank_of(worker)
            arrived = parcel.receive(source, content if is_complete else None, kind, fixed, self._device)
        except parcel.MalformedParcelError:
            return own, Finding.FAILED
        except parcel.OtherStructureError:
            return own, Finding.OTHER_STRUCTURE
        return _unpacked(own, arrived), Finding.RECOMPUTED


def _content(batches: list[CapturedBatch]) -> tuple[list[Tensor], list[int]]:
    """Return all tensors, and the indices of those whose shape is the same on all ranks."""
    content: list[Tensor] = []
    fixed: list[int] = []
    for batch in batches:
        fixed += range(len(content), len(content) + len(batch.state))
        content += [*batch.state, *batch.content]
    return content, fixed


def _unpacked(own: list[CapturedBatch], content: list[Tensor]) -> list[CapturedBatch]:
    batches, rest = [], content
    for batch in own:
        num_state, num_content = len(batch.state), len(batch.content)
        state, values = rest[:num_state], rest[num_state : num_state + num_content]
        rest = rest[num_state + num_content :]
        batches.append(batch.replaced_by(state, values))
    return batches


def _seed(nonces: dict[int, int]) -> int:
    # Of all ranks: nobody knows it before the last one has revealed its own, after all rows have arrived.
    return int.from_bytes(sha256(str(sorted(nonces.items())).encode()).digest()[:4], "big")
