"""What ranks write into their common store for each other."""

import json
from typing import Any

from lightning_byzantine.errors import DesynchronizedRanksError, WorkerLostError
from lightning_byzantine.exchange.torch_internals import PrefixStore, Store
from lightning_byzantine.watch.whereabouts import Whereabouts

__all__ = ["Board", "FatalError"]

FatalError = WorkerLostError | DesynchronizedRanksError

_MAX_LENGTH = 2000  # characters of a reason


class Board:
    """Where each rank is, and why the run has ended, in a store that all ranks reach.

    Calls have no timeout: the store of a stopped process does not answer, that of an ended one raises a RuntimeError.

    Args:
        store: the store.
        name: the run's name, the same on all ranks but unique to the run: a store can survive a restart.
        num_ranks: number of ranks.

    Example:
        >>> from torch.distributed import HashStore
        >>> board = Board(HashStore(), "run", num_ranks=2)
        >>> board.write(1, Whereabouts(beats=3))
        >>> [rank.beats for rank in board.read()]
        [0, 3]
        >>> board.declare(WorkerLostError([1], "it has failed"))
        WorkerLostError('Lost rank 1: it has failed')
        >>> board.declare(WorkerLostError([0], "it has failed"))
        WorkerLostError('Lost rank 1: it has failed')

    """

    def __init__(self, store: Store, name: str, num_ranks: int) -> None:
        # A separate client, because another thread can block a shared one for as long as its timeout.
        self._store = PrefixStore(f"lightning_byzantine/{name}", store.clone())  # type: ignore[attr-defined]
        self._ranks = [f"rank/{rank}" for rank in range(num_ranks)]

    def write(self, rank: int, whereabouts: Whereabouts) -> None:
        """State where a rank is."""
        self._store.set(self._ranks[rank], whereabouts.encode())

    def read(self) -> list[Whereabouts]:
        """Return where each rank is; at the start, if it has not stated it yet."""
        # To get a missing key is to wait for it.
        has_all = self._store.check(self._ranks)
        stated = [has_all or self._store.check([key]) for key in self._ranks]
        return [
            Whereabouts.decode(self._store.get(key)) if is_stated else Whereabouts()
            for key, is_stated in zip(self._ranks, stated, strict=True)
        ]

    def declare(self, error: FatalError) -> FatalError:
        """State why the run has ended, and return the reason of the rank that was the first to do so."""
        value = {"lost": error.ranks, "reason": error.reason} if isinstance(error, WorkerLostError) else error.places
        return self._decoded(self._store.compare_set("end", "", json.dumps(value)))

    def declared(self) -> FatalError | None:
        """Return why the run has ended; None while it goes on."""
        return self._decoded(self._store.get("end")) if self._store.check(["end"]) else None

    def close(self) -> None:
        """Close the connection to the store."""
        del self._store

    def _decoded(self, text: bytes) -> FatalError:
        try:
            value: Any = json.loads(text)
            if isinstance(value, dict):
                return WorkerLostError([int(rank) for rank in value["lost"]], str(value["reason"])[:_MAX_LENGTH])
            if isinstance(value, list) and len(value) == len(self._ranks):
                return DesynchronizedRanksError([str(place)[:_MAX_LENGTH] for place in value])
        except (KeyError, OverflowError, RecursionError, TypeError, ValueError):
            pass
        return WorkerLostError([], f"a rank has ended the run, and gives a reason that can't be read: {text[:100]!r}.")
