"""Heartbeats, by which ranks know where the others are, and end together when they can't continue."""

import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from datetime import timedelta
from threading import Event, Thread

from lightning_byzantine.errors import DesynchronizedRanksError, WorkerLostError
from lightning_byzantine.exchange.collectives import is_failed_collective
from lightning_byzantine.exchange.torch_internals import Store
from lightning_byzantine.watch.board import Board, FatalError
from lightning_byzantine.watch.connections import abort_collectives, connected_ports, port_of
from lightning_byzantine.watch.signs_of_life import SignsOfLife
from lightning_byzantine.watch.whereabouts import Whereabouts, find_desynchronized

__all__ = ["Heartbeat"]

_PERIOD = 0.5  # seconds between heartbeats
_SHORT_PERIOD = 0.02  # the same, while this rank waits for what others state
_UNUSUAL_WAIT = 1.0  # seconds in a collective after which it looks where the others are
_PATIENCE = 3.0  # seconds without a heartbeat after which a rank counts as missing
_GRACE = 0.5  # seconds that a rank gets to raise an error of its own before its collective is aborted
_MAX_LENGTH = 2000  # characters of an error that others show
_COURTESY = 5.0  # seconds that a failed rank stays for others to find out, because its launcher then kills them


class Heartbeat:
    """Tells the other ranks, through the process group's store, that this one is alive and which collective it is in.

    A thread does so twice a second. It continues while the rank computes, and ends when the process is killed or
    stopped. While the rank waits in a collective, the thread looks where the others are. If they wait in another one,
    or one of them has failed, the run ends on all ranks, for the reason of the first to find one: their collectives
    fail. What ranks state is not verified. One that lies can end the run, as it can by leaving it.

    Args:
        store: a store that all ranks can reach.
        name: the run's name, the same on all ranks but unique to the run: a store can survive a restart.
        rank: this rank.
        num_ranks: number of ranks.
        timeout: the timeout of collectives.

    Attributes:
        error: why the run has ended, once it is known.

    Example:
        >>> from torch.distributed import HashStore
        >>> heartbeat = Heartbeat(HashStore(), "run", rank=0, num_ranks=1, timeout=timedelta(seconds=60))
        >>> heartbeat.start()
        >>> with heartbeat.watching("the backward pass of batch 0"):
        ...     pass  # a collective
        >>> heartbeat.stay()
        >>> heartbeat.stop()

    """

    def __init__(self, store: Store, name: str, rank: int, num_ranks: int, timeout: timedelta) -> None:
        self.error: FatalError | None = None
        self._board = Board(store, name, num_ranks)  # is the thread's, since it can block for ever
        self._rank = rank
        self._timeout = timeout.total_seconds()
        self._here = Whereabouts()
        self._port_of_store = port_of(store)
        self._signs = SignsOfLife(rank, num_ranks, _PATIENCE)
        self._period = max(_PERIOD, 0.01 * num_ranks)  # the store has to answer all of them
        self._waits_since: float | None = None
        self._has_failed = False
        self._failure: str | None = None  # which is not that of another rank
        self._has_aborted = False
        self._inquiry: _Inquiry | None = None
        self._hurries = False  # the main thread waits for what others state
        self._known_since: float | None = None  # since when there is an error
        self._beats = 0
        self._ports: tuple[int, ...] = ()
        self._is_stopped = False
        self._is_cut_off = False
        self._wake = Event()
        self._thread = Thread(target=self._beat, name="heartbeat", daemon=True)

    def start(self) -> None:
        """Start sending heartbeats."""
        self._thread.start()

    def stop(self) -> None:
        """Stop sending heartbeats."""
        self._is_stopped = True
        self._wake.set()
        # Wait for a heartbeat in progress, which would abort Python at exit, but not for a store that does not answer.
        self._thread.join(_PATIENCE)

    @contextmanager
    def watching(self, place: str) -> Iterator[None]:
        """Wrap a collective, so that it fails when ranks are missing, with an error that names them.

        Args:
            place: what the collective is for, in the same words on all ranks.

        Raises:
            WorkerLostError: if a rank has failed or is missing.
            DesynchronizedRanksError: if ranks wait for each other in different collectives.

        """
        if self.error is not None:
            raise self.error
        outer = self._waits_since
        self._here = self._here.entering(place)
        self._waits_since = time.monotonic()
        try:
            with self.naming():
                yield
        finally:
            self._waits_since = outer
            self._here = replace(self._here, waits=outer is not None)

    @contextmanager
    def naming(self) -> Iterator[None]:
        """Wrap collectives that other ranks may never enter, so that they fail with an error that names ranks.

        Raises:
            WorkerLostError: if a rank has failed or is missing.
            DesynchronizedRanksError: if ranks wait for each other in different collectives.

        """
        began = time.monotonic()
        try:
            yield
            if self._has_aborted and self.error is not None:
                raise self.error  # what an aborted collective has written is worth nothing
        except RuntimeError as error:
            if self._has_aborted and self.error is not None and error is not self.error:
                raise self.error from error
            if isinstance(error, FatalError) or not is_failed_collective(error):
                raise
            lost = self._find_lost(timed_out=time.monotonic() - began >= 0.9 * self._timeout)
            if lost is None:
                raise
            raise lost from error

    def retract(self) -> None:
        """Take back the last collective: nothing was sent in it, and other ranks may still wait there."""
        self._here = self._here.retracting()

    def fail(self, error: BaseException) -> None:
        """State that this rank has failed, so that others don't wait for it.

        If the error is one of a collective that is not watched, such as of torchmetrics, a note is added to it that
        names the ranks that are missing.
        """
        if self._has_failed:
            return
        self._has_failed = True
        if isinstance(error, FatalError) or not is_failed_collective(error):
            self._failure = f"{type(error).__name__}: {_text_of(error)}"[:_MAX_LENGTH]
            self._wake.set()
        elif (lost := self._find_lost(timed_out=False)) is not None:
            error.add_note(f"{type(lost).__name__}: {lost}")

    def desynchronized(self) -> FatalError:
        """Return an error that names where ranks are, which have come to one place for different collectives."""
        return self._find_lost(timed_out=False) or WorkerLostError(
            [], "a rank is not in the collective that it states."
        )

    def stay(self) -> None:
        """Wait, in the end, for other ranks to find out why: rank 0 may host the store, and launchers kill the rest."""
        self._here = replace(self._here, has_ended=True)
        if not self._has_failed and self.error is None:
            return
        deadline = time.monotonic() + _COURTESY
        self._hurry()
        while not (self._is_cut_off or self._signs.have_ended() or time.monotonic() > deadline):
            time.sleep(_SHORT_PERIOD)

    def _hurry(self) -> None:
        self._hurries = True
        self._wake.set()

    def _find_lost(self, timed_out: bool) -> FatalError | None:
        inquiry = self._inquiry = _Inquiry(timed_out)
        self._hurry()
        began = time.monotonic()
        while self.error is None and not inquiry.is_answered:
            unanswered = time.monotonic() - max(began, self._signs.read_at)
            if self._is_cut_off or unanswered > 2.5 * _PATIENCE:
                self.error = _without_store()
            time.sleep(_SHORT_PERIOD)
        # If nobody is missing, the module may catch the error, and the run goes on.
        self._inquiry, self._hurries = None, False
        return self.error

    def _beat(self) -> None:
        try:
            while not self._is_stopped:
                self._write()
                self._read()
                self._wake.wait(_SHORT_PERIOD if self._hurries else self._period)
                self._wake.clear()
            self._write()
        except RuntimeError:  # the store is gone
            pass
        finally:
            self._is_cut_off = True
            self._board.close()

    def _write(self) -> None:
        self._beats += 1
        if not self._hurries or not self._ports:
            self._ports = tuple(connected_ports(besides=self._port_of_store))  # some connect when they first send
        self._board.write(self._rank, replace(self._here, beats=self._beats, ports=self._ports))
        if self._failure is not None and self.error is None:
            self._end(WorkerLostError([self._rank], f"it has failed with {self._failure}"))

    def _read(self) -> None:
        if self.error is None:
            self.error = self._board.declared()
        waited = 0.0 if self._waits_since is None else time.monotonic() - self._waits_since
        if self._hurries or waited > _UNUSUAL_WAIT or self.error is not None:
            inquiry = self._inquiry
            self._signs.update(self._board.read())
            if self.error is None:
                self._judge(inquiry)
        if self.error is not None and not self._has_failed and not self._here.has_ended:
            self._abort()

    def _judge(self, inquiry: "_Inquiry | None") -> None:
        """End the run if ranks can't continue together."""
        places, age = find_desynchronized(self._signs.ranks), 0.0
        if inquiry is not None:
            # A rank that was gone before the inquiry is silent from its first reading on.
            inquiry.first_read = inquiry.first_read or self._signs.read_at
            age = self._signs.read_at - inquiry.first_read
        if places is not None:
            self._end(DesynchronizedRanksError(places))
        elif inquiry is not None and age > _PATIENCE:
            # A collective that is not watched comes after the last one.
            late = self._signs.late(self._here.entered + (not self._here.waits))
            silent, last = self._signs.silent(), self._signs.last_places()
            if silent:
                reason = f"no sign of life for {_PATIENCE:g} s. The process has ended, is stopped, or can't be reached."
                self._end(WorkerLostError(silent, reason))
            elif inquiry.timed_out and late:
                reason = f"alive, but the others waited for it for more than the timeout of {self._timeout:g} s."
                self._end(WorkerLostError(late, reason))
            elif inquiry.timed_out and len(set(last)) > 1:
                self._end(DesynchronizedRanksError(last))
            elif inquiry.timed_out:
                reason = f"all ranks are in {last[0]}, and one has sent nothing for {self._timeout:g} s."
                self._end(WorkerLostError([], reason))
            inquiry.is_answered = True

    def _end(self, error: FatalError) -> None:
        self.error = self._board.declare(error)

    def _abort(self) -> None:
        """Abort collectives in which this rank may wait, unless it has just raised an error of its own."""
        if self._known_since is None:
            self._known_since = time.monotonic()
        if time.monotonic() - self._known_since >= _GRACE:
            self._has_aborted = True
            abort_collectives(self._ports, self._signs.ports_of_others())


@dataclass
class _Inquiry:
    """What the main thread asks this one: who is missing, since a collective has failed."""

    timed_out: bool
    is_answered: bool = False
    first_read: float | None = None


def _text_of(error: BaseException) -> str:
    try:
        return str(error)
    except Exception:
        return "(it can't be shown as text)"


def _without_store() -> WorkerLostError:
    if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True":
        return WorkerLostError([], "the torchrun of the first node, which hosts the ranks' store, does not answer.")
    return WorkerLostError([0], "it does not answer, and it hosts the store that all ranks need.")
