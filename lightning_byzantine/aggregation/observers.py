"""Observers of each aggregation's report on the workers."""

from collections import OrderedDict
from collections.abc import Callable, Collection, Iterable
from dataclasses import replace

import torch
from torch import Tensor
from torch.utils.hooks import RemovableHandle

from lightning_byzantine.aggregators import Report

__all__ = ["Observers"]


class Observers:
    """Functions that are called with the report of every aggregation.

    Example:
        >>> observers = Observers()
        >>> handle = observers.add(lambda report: print(report.trimmed))
        >>> observers.tell(lambda: Report.of_breakdown([1], num_workers=3))
        tensor([False,  True, False])
        >>> handle.remove()
        >>> observers.tell(lambda: Report.of_breakdown([1], num_workers=3))

    """

    def __init__(self) -> None:
        self._functions: dict[int, Callable[[Report], None]] = OrderedDict()
        self._outvoted: Tensor | None = None
        self._equivocated: frozenset[int] = frozenset()

    def add(self, observer: Callable[[Report], None]) -> RemovableHandle:
        """Call a function with every report, until ``remove()`` of the returned handle."""
        handle = RemovableHandle(self._functions)
        self._functions[handle.id] = observer
        return handle

    def note_outvoted(self, outvoted: Tensor) -> None:
        """Add to the next report which ranks were outvoted in buffers or metrics, [n] bool."""
        # On their device until needed, so as not to synchronize a GPU.
        self._outvoted = outvoted if self._outvoted is None else self._outvoted | outvoted.to(self._outvoted.device)

    def note_equivocated(self, workers: Iterable[int]) -> None:
        """Add to the next report which workers are proved to have told others different things."""
        self._equivocated |= frozenset(workers)

    def forget_notes(self) -> None:
        """Clear what was noted for the next report, at the end of the run."""
        self._outvoted, self._equivocated = None, frozenset()

    def tell(self, report: Callable[[], Report], cleared: Collection[int] = ()) -> None:
        """Call all observers.

        Args:
            report: makes the report; not called without observers.
            cleared: workers that are not reported as outvoted, such as quarantined ones.

        """
        if not self._functions:
            return
        made, outvoted, equivocated = report(), self._outvoted, self._equivocated
        self.forget_notes()
        if equivocated:
            named = torch.zeros_like(made.measurable)
            named[list(equivocated)] = True
            made = replace(made, equivocated=named)
        if outvoted is not None and outvoted.any():
            workers = _of_workers(outvoted.cpu(), len(made.measurable))
            workers[list(cleared)] = False
            made = replace(made, outvoted=workers)
        for function in list(self._functions.values()):  # one of them may remove itself
            function(made)


def _of_workers(ranks: Tensor, num_workers: int) -> Tensor:
    """Return which workers are meant, [m] bool, given the ranks, [n] bool: one of several of each, or each several."""
    if num_workers < len(ranks):
        return ranks.view(num_workers, -1).any(dim=1)
    return ranks.repeat_interleave(num_workers // len(ranks))
