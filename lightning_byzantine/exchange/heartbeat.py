"""Signs of life, by which ranks find out who is missing when a collective fails."""

import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from threading import Event, Thread

from torch._C._distributed_c10d import PrefixStore, Store  # where torch.distributed's are typed

from lightning_byzantine.errors import ByzantineBreakdownError, WorkerLostError

__all__ = ["Heartbeat"]

_PERIOD = 0.5  # seconds
_PATIENCE = 3.0  # seconds without a beat, after which a rank counts as missing


class Heartbeat:
    """Tells the other ranks, through the process group's store, that this one lives and how far it has come.

    A thread beats twice a second: it goes on while the rank computes, and stops when the process is killed or stopped.
    What a rank says of itself is believed, as it serves for a message only.

    Args:
        store: what all ranks can reach.
        name: of this run, the same on all ranks, and another one for every run: a store may outlive a restart.
        rank: this rank.
        num_ranks: number of ranks.
        timeout: after which collectives fail.

    Attributes:
        lost: why the run can't go on, once that was found out.

    Example:
        >>> from torch.distributed import HashStore
        >>> heartbeat = Heartbeat(HashStore(), "run", rank=0, num_ranks=1, timeout=timedelta(seconds=60))
        >>> heartbeat.start()
        >>> with heartbeat.watching():
        ...     pass  # a collective
        >>> heartbeat.stop()

    """

    def __init__(self, store: Store, name: str, rank: int, num_ranks: int, timeout: timedelta) -> None:
        self.lost: WorkerLostError | None = None
        # A client of its own, since somebody else's may wait for hours.
        self._store = PrefixStore(f"lightning_byzantine/{name}", store.clone())  # type: ignore[attr-defined]
        self._rank = rank
        self._num_ranks = num_ranks
        self._timeout = timeout.total_seconds()
        self._collectives = 0
        self._stopped = Event()
        self._thread = Thread(target=self._beat, name="heartbeat", daemon=True)

    def start(self) -> None:
        """Begin to beat."""
        self._thread.start()

    def stop(self) -> None:
        """Stop to beat."""
        self._stopped.set()
        # A thread that is left in the middle of a beat would abort Python at its end. One that waits for a store which
        # does not answer has to be left.
        self._thread.join(_PATIENCE)

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Wrap a collective, to have it say who is missing when it fails.

        Raises:
            WorkerLostError: if the block raises a RuntimeError, as failed collectives do, and ranks are missing.

        """
        self._collectives += 1
        began = time.monotonic()
        try:
            yield
        except (ByzantineBreakdownError, WorkerLostError):
            raise
        except RuntimeError as error:
            self.lost = self._find_lost(timed_out=time.monotonic() - began >= 0.9 * self._timeout)
            if self.lost is None:
                raise
            raise self.lost from error

    def _beat(self) -> None:
        published = 0
        try:
            while not self._stopped.wait(_PERIOD):
                reached = self._collectives
                self._store.add(f"reached/{self._rank}", reached - published)
                self._store.add(f"beats/{self._rank}", 1)
                published = reached
        except RuntimeError:
            return  # nobody is left to beat for

    def _find_lost(self, timed_out: bool) -> WorkerLostError | None:
        # Not in this thread: a store in a stopped process answers no more, and has no timeout for that.
        found: list[WorkerLostError | None] = []
        thread = Thread(target=lambda: found.append(self._look_around(timed_out)), daemon=True)
        thread.start()
        thread.join(4 * _PATIENCE)
        return found[0] if found else _without_store()

    def _look_around(self, timed_out: bool) -> WorkerLostError | None:
        try:
            lost = self._judge(timed_out)
            if lost is not None:
                self._store.add(f"looked/{self._rank}", 1)
                if self._rank == 0:
                    self._wait_for({*range(1, self._num_ranks)} - {*lost.ranks})
        except RuntimeError:
            return _without_store()
        return lost

    def _judge(self, timed_out: bool) -> WorkerLostError | None:
        before = self._read("beats")
        time.sleep(_PATIENCE)
        # Who comes first may be gone when others look around, though it is not the one who was missing.
        if self._store.check(["lost"]):
            ranks, _, reason = self._store.get("lost").decode().partition(":")
            return WorkerLostError([int(rank) for rank in ranks.split(",") if rank.isdecimal()], reason)
        after = self._read("beats")
        silent = [rank for rank in range(self._num_ranks) if rank != self._rank and before[rank] == after[rank]]
        behind = [rank for rank, reached in enumerate(self._read("reached")) if reached < self._collectives]
        if silent:
            lost = WorkerLostError(
                silent, f"no sign of life for {_PATIENCE:g} s. The process has ended, was stopped, or is cut off."
            )
        elif timed_out and behind and self._rank not in behind:
            lost = WorkerLostError(
                behind, f"alive, but the others waited for it for more than the timeout of {self._timeout:g} s."
            )
        else:
            return None
        self._store.set("lost", f"{','.join(map(str, lost.ranks))}:{lost.reason}")
        return lost

    def _wait_for(self, others: set[int]) -> None:
        """Stay until they have looked around as well: with this process the store may end."""
        deadline = time.monotonic() + 2 * _PATIENCE
        while time.monotonic() < deadline:
            looked = self._read("looked")
            if all(looked[rank] for rank in others):
                return
            time.sleep(_PERIOD / 5)

    def _read(self, what: str) -> list[int]:
        # To add nothing is to read without waiting for a key that is not there.
        return [self._store.add(f"{what}/{rank}", 0) for rank in range(self._num_ranks)]


def _without_store() -> WorkerLostError:
    if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True":
        return WorkerLostError([], "the torchrun of the first node, which ranks find each other by, does not answer.")
    return WorkerLostError([0], "it does not answer, and the others find each other by its store.")
