"""Those who are told what each aggregation found out about the workers."""

from collections import Counter, OrderedDict
from collections.abc import Callable, Collection
from dataclasses import replace
from itertools import chain

from torch import Tensor
from torch.utils.hooks import RemovableHandle

from lightning_byzantine.aggregators import Report
from lightning_byzantine.matrix import WorkerMatrix

__all__ = ["Observers"]

# Counting bits takes longer than all else that observers are told, and a fault in a chip stays.
_BITS_EVERY_N_STEPS = 10


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
        self._aggregations: Counter[frozenset[str | None]] = Counter()
        self._outvoted: Tensor | None = None

    def add(self, observer: Callable[[Report], None]) -> RemovableHandle:
        """Call a function from now on, until ``remove()`` of the handle that is returned."""
        handle = RemovableHandle(self._functions)
        self._functions[handle.id] = observer
        return handle

    def note_outvoted(self, outvoted: Tensor) -> None:
        """Remember for the next report which ranks were outvoted in buffers or metrics, [n] bool."""
        # On their device until somebody asks: a GPU would have to be waited for.
        self._outvoted = outvoted if self._outvoted is None else self._outvoted | outvoted.to(self._outvoted.device)

    def forget_outvoted(self) -> None:
        """Forget who was outvoted: the run has ended."""
        self._outvoted = None

    def want_bits_of(self, matrix: WorkerMatrix) -> bool:
        """Count an aggregation, and tell whether bits are to be counted in it."""
        if not self._functions:
            return False
        # Not the Trainer's step: of networks that take turns, it might only ever meet one.
        parameters = frozenset(chain.from_iterable(matrix.layout or ()))
        self._aggregations[parameters] += 1
        return self._aggregations[parameters] % _BITS_EVERY_N_STEPS == 1

    def tell(self, report: Callable[[], Report], cleared: Collection[int] = ()) -> None:
        """Call all observers.

        Args:
            report: makes the report, if there is anybody to read it.
            cleared: workers whose votes are held against them no more.

        """
        if not self._functions:
            return
        made, self._outvoted, outvoted = report(), None, self._outvoted
        if outvoted is not None and outvoted.any():
            workers = outvoted.cpu().repeat_interleave(len(made.measurable) // len(outvoted))
            workers[list(cleared)] = False
            made = replace(made, outvoted=workers)
        for function in self._functions.values():
            function(made)
