"""Collectives that fail, with an error that names ranks, where they would wait for ever."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from functools import wraps
from secrets import randbits  # does not change the random state of training
from typing import Any, TypeVar

import torch
import torch.distributed as dist

from lightning_byzantine.errors import WorkerLostError
from lightning_byzantine.exchange.torch_internals import _get_default_store, timeout_of
from lightning_byzantine.watch.heartbeat import Heartbeat
from lightning_byzantine.watch.rendezvous import Rendezvous

__all__ = ["RankWatch"]

_Collective = TypeVar("_Collective", bound=Callable[..., Any])


class RankWatch:
    """Has ranks meet before a collective, and watches it by their heartbeats. To be created on all ranks at once.

    Args:
        device: where the process group's tensors are.
        position: returns where the run is, which is the same on all ranks when they meet.

    """

    def __init__(self, device: torch.device, position: Callable[[], str]) -> None:
        timeout = timeout_of(device)
        self._position = position
        self._rendezvous = Rendezvous(timeout)
        name = torch.tensor([randbits(62)], device=device)
        dist.broadcast(name, src=0)
        store, rank, num_ranks = _get_default_store(), dist.get_rank(), dist.get_world_size()
        self._heartbeat = Heartbeat(store, f"{name.item():x}", rank, num_ranks, timeout)
        self._heartbeat.start()

    def watched(self, collective: _Collective, what: str, meets: bool = True) -> _Collective:
        """Return the same function, except that it fails when ranks are missing or elsewhere.

        Args:
            collective: the function.
            what: what it is for, in the same words on all ranks.
            meets: whether ranks make sure before that they are in the same one. Not worth its time if they have just
                met, and what they send can't be received in another.

        """

        @wraps(collective)
        def watched(*args: Any, **kwargs: Any) -> Any:
            with self._watching(what) as place:
                if meets:
                    self._meet(place)
                return collective(*args, **kwargs)

        return watched  # type: ignore[return-value]

    def named(self, function: _Collective) -> _Collective:
        """Return the same function, except that its collectives fail with an error that names the missing ranks.

        It counts as computing: ranks that are still in it are late for those that wait elsewhere.

        Args:
            function: the function, whose collectives may be of some ranks only.

        """

        @wraps(function)
        def named(*args: Any, **kwargs: Any) -> Any:
            with self._heartbeat.naming():
                return function(*args, **kwargs)

        return named  # type: ignore[return-value]

    def any_rank(self, what: str, flag: bool) -> bool:
        """Return on all ranks whether any of them has called this with True."""
        with self._watching(what) as place:
            return self._meet(place, flag)

    def are_equal(self, what: str, value: object) -> bool:
        """Return on all ranks whether all of them have called this with the same value, as text."""
        with self._watching(what):
            return self._rendezvous.meet(str(value))[0]

    def retract(self) -> None:
        """Take back the last watched collective: nothing was sent in it, and other ranks may still wait there."""
        self._heartbeat.retract()

    def fail(self, error: BaseException) -> None:
        """Tell the other ranks that this one ends for an error."""
        self._heartbeat.fail(error)

    def finish(self, is_well: bool) -> None:
        """Leave the run together with the other ranks.

        Args:
            is_well: whether this rank is at the end of the run, instead of having failed.

        Raises:
            DesynchronizedRanksError: if it is, and others wait for it in another collective.

        """
        try:
            if is_well:
                with suppress(WorkerLostError):  # has all it needs
                    self.any_rank("the end of the run", False)
                    self._rendezvous.close()
        finally:
            self._heartbeat.stay()
            self._heartbeat.stop()

    @contextmanager
    def _watching(self, what: str) -> Iterator[str]:
        place = f"{what} ({self._position()})"
        with self._heartbeat.watching(place):
            yield place

    def _meet(self, place: str, flag: bool = False) -> bool:
        are_together, any_flag = self._rendezvous.meet(place, flag)
        if not are_together:
            raise self._heartbeat.desynchronized()
        return any_flag
