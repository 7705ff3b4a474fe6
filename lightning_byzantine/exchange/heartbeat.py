"""Heartbeats, by which ranks find out which of them is missing when a collective fails."""

import os
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from datetime import timedelta
from threading import Event, Thread

from lightning_byzantine.errors import ByzantineBreakdownError, InconsistentRanksError, WorkerLostError
from lightning_byzantine.exchange.torch_internals import PrefixStore, Store

__all__ = ["Heartbeat"]

_PERIOD = 0.5  # seconds
_PATIENCE = 3.0  # seconds without a heartbeat after which a rank counts as missing


class Heartbeat:
    """Tells the other ranks, through the process group's store, that this one is alive and which collective it is in.

    A thread sends a heartbeat twice a second. It continues while the rank computes, and ends when the process is killed
    or stopped. The reports of other ranks are not verified, because they only serve for the error message.

    Args:
        store: a store that all ranks can reach.
        name: the run's name, the same on all ranks but unique to the run: a store can survive a restart.
        rank: this rank.
        num_ranks: number of ranks.
        timeout: the timeout of collectives.

    Attributes:
        lost: the error that ended the run, once it is known.

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
        # A separate client, because another thread can block a shared one for as long as its timeout.
        self._store = PrefixStore(f"lightning_byzantine/{name}", store.clone())  # type: ignore[attr-defined]
        self._rank = rank
        self._num_ranks = num_ranks
        self._timeout = timeout.total_seconds()
        self._collectives = 0
        self._stopped = Event()
        self._thread = Thread(target=self._beat, name="heartbeat", daemon=True)

    def start(self) -> None:
        """Start sending heartbeats."""
        self._thread.start()

    def stop(self) -> None:
        """Stop sending heartbeats."""
        self._stopped.set()
        # Wait for a heartbeat in progress, which would abort Python at exit, but not for a store that does not answer.
        self._thread.join(_PATIENCE)

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Wrap a collective, so that its error names the missing ranks if it fails.

        Raises:
            WorkerLostError: if the block raises a RuntimeError, as failed collectives do, and ranks are missing.

        """
        self._collectives += 1
        began = time.monotonic()
        try:
            yield
        except (ByzantineBreakdownError, InconsistentRanksError, WorkerLostError):
            raise  # nobody is missing
        except RuntimeError as error:
            self.lost = self._find_lost(timed_out=time.monotonic() - began >= 0.9 * self._timeout)
            if self.lost is None:
                raise
            raise self.lost from error

    def _beat(self) -> None:
        published = 0
        with suppress(RuntimeError):  # raised if the store is gone
            while not self._stopped.wait(_PERIOD):
                reached = self._collectives
                self._store.add(f"reached/{self._rank}", reached - published)
                self._store.add(f"beats/{self._rank}", 1)
                published = reached

    def _find_lost(self, timed_out: bool) -> WorkerLostError | None:
        # In another thread, because the store of a stopped process does not answer, and calls have no timeout.
        found: list[WorkerLostError | None] = []

        def find() -> None:
            with suppress(RuntimeError):  # raised if the store is gone
                lost = self._judge(timed_out)
                if lost is not None:
                    self._wait_for_others(lost)
                found.append(lost)

        thread = Thread(target=find, daemon=True)
        thread.start()
        thread.join(4 * _PATIENCE)
        return found[0] if found else _without_store()

    def _judge(self, timed_out: bool) -> WorkerLostError | None:
        before = self._read("beats")
        time.sleep(_PATIENCE)
        # The rank that found out first may have ended since then, so its result takes precedence.
        if self._store.check(["lost"]):
            ranks, _, reason = self._store.get("lost").decode().partition(":")
            return WorkerLostError([int(rank) for rank in ranks.split(",") if rank.isdecimal()], reason)
        after = self._read("beats")
        silent = [rank for rank in range(self._num_ranks) if rank != self._rank and before[rank] == after[rank]]
        behind = [rank for rank, reached in enumerate(self._read("reached")) if reached < self._collectives]
        if silent:
            reason = f"no sign of life for {_PATIENCE:g} s. The process has ended, is stopped, or can't be reached."
        elif timed_out and behind and self._rank not in behind:
            reason = f"alive, but the others waited for it for more than the timeout of {self._timeout:g} s."
        else:
            return None
        lost = WorkerLostError(silent or behind, reason)
        self._store.set("lost", f"{','.join(map(str, lost.ranks))}:{lost.reason}")
        return lost

    def _wait_for_others(self, lost: WorkerLostError) -> None:
        """Mark this rank as done; rank 0 waits for the others, because the store may end with its process."""
        self._store.add(f"judged/{self._rank}", 1)
        unaware = set(range(self._num_ranks)) - set(lost.ranks) if self._rank == 0 else set()
        deadline = time.monotonic() + 2 * _PATIENCE
        while unaware and time.monotonic() < deadline:
            judged = self._read("judged")
            unaware = {rank for rank in unaware if not judged[rank]}
            time.sleep(_PERIOD / 5)

    def _read(self, what: str) -> list[int]:
        # Adding 0 reads a counter without waiting for a missing key.
        return [self._store.add(f"{what}/{rank}", 0) for rank in range(self._num_ranks)]


def _without_store() -> WorkerLostError:
    if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True":
        return WorkerLostError([], "the torchrun of the first node, which hosts the ranks' store, does not answer.")
    return WorkerLostError([0], "it does not answer, and it hosts the store that all ranks need.")
