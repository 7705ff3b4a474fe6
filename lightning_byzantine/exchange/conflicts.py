"""Who must have lied, given what ranks say that others told them."""

from collections import Counter
from collections.abc import Collection, Hashable, Iterable, Mapping
from typing import TypeVar

from lightning_byzantine.errors import EquivocationError

__all__ = ["Conflicts"]

_Subject = TypeVar("_Subject", bound=Hashable)
_Value = TypeVar("_Value", bound=Hashable)


class Conflicts:
    """Pairs of ranks that contradict each other, and the ranks that are thereby proved to be faulty.

    Of m ranks, at most f are faulty. Honest ones say of each other what is true, and two that contradict each other
    can't both be honest. So

    - what a rank is said to have told is accepted if m - f ranks say the same, itself included. That is so of all that
      an honest rank tells, and of two different values at most one has so many;
    - a rank of which nothing is accepted, or which itself says otherwise, is proved to be faulty;
    - a rank that says something else than what is accepted is in conflict with the one that it is said of;
    - a rank is proved to be faulty if it is in conflict with more others than may be faulty besides those proved.

    All ranks have to judge by the same statements.

    Args:
        num_ranks: m.
        max_faulty: f, under m / 2.

    Attributes:
        pairs: ranks in conflict, as (smaller, larger).
        proved: the ranks proved to be faulty.

    Example:
        >>> conflicts = Conflicts(num_ranks=5, max_faulty=2)
        >>> conflicts.judge({(1, "row"): {0: "a", 1: "a", 2: "b", 3: "c", 4: "d"}})
        {}
        >>> conflicts.proved
        frozenset({1})
        >>> conflicts.judge({(2, "row"): {0: "a", 2: "a", 3: "a", 4: "b"}})
        {(2, 'row'): 'a'}
        >>> conflicts.pairs
        {(2, 4)}

    """

    def __init__(self, num_ranks: int, max_faulty: int) -> None:
        self.pairs: set[tuple[int, int]] = set()
        self.proved: frozenset[int] = frozenset()
        self._num_ranks = num_ranks
        self._max_faulty = max_faulty

    @property
    def voters(self) -> list[int]:
        """The ranks that may be honest."""
        return [rank for rank in range(self._num_ranks) if rank not in self.proved]

    @property
    def max_left(self) -> int:
        """How many of :attr:`voters` may be faulty."""
        return self._max_faulty - len(self.proved)

    def prove(self, ranks: Iterable[int]) -> None:
        """Add ranks that are proved to be faulty.

        Raises:
            EquivocationError: if there are more than f.

        """
        self.proved = self.proved | frozenset(ranks)
        if self.max_left < 0:
            raise EquivocationError(
                sorted(self.proved),
                f"are proved to be faulty, but of {self._num_ranks} ranks no more than {self._max_faulty} may be",
            )
        while True:
            degrees = Counter(rank for pair in self.pairs if self.proved.isdisjoint(pair) for rank in pair)
            more = {rank for rank, degree in degrees.items() if degree > self.max_left}
            if not more:
                return
            self.prove(more)

    def exclude(self, ranks: Collection[int]) -> None:
        """Add ranks that are proved to be faulty otherwise, which may be more than f; then no others are."""
        self._max_faulty = max(self._max_faulty, len(self.proved.union(ranks)))
        self.prove(ranks)

    def add(self, first: int, second: int) -> None:
        """Add two ranks that contradict each other."""
        self.pairs.add((min(first, second), max(first, second)))
        self.prove(())

    def include(self, first: int, second: int) -> bool:
        """Return whether two ranks are in conflict."""
        return (min(first, second), max(first, second)) in self.pairs

    @property
    def unsuspected(self) -> list[int]:
        """The ranks that are in conflict with nobody, if at least one of them must be honest; else none.

        Of each two ranks in conflict, at least one is faulty, so that fewer of the others can be.
        """
        paired: set[int] = set()
        for pair in sorted(self.pairs):
            if self.proved.isdisjoint(pair) and paired.isdisjoint(pair):
                paired.update(pair)
        at_peace = [rank for rank in self.voters if not any(self.include(rank, other) for other in self.voters)]
        return at_peace if len(at_peace) > self.max_left - len(paired) // 2 else []

    def accepted(self, said: Mapping[int, _Value]) -> _Value | None:
        """Return what m - f ranks say; None if there is no such value. Ranks proved to be faulty don't count."""
        votes = Counter(value for rank, value in said.items() if rank not in self.proved)
        return next((value for value, count in votes.items() if count >= self._num_ranks - self._max_faulty), None)

    def judge(
        self, statements: Mapping[tuple[int, _Subject], Mapping[int, _Value]]
    ) -> dict[tuple[int, _Subject], _Value]:
        """Compare what ranks say that each other one told them.

        Args:
            statements: by rank r and subject, what each rank says that r told it, by rank; r's own word included.

        Returns:
            What is accepted, of ranks that are not proved to be faulty.

        Raises:
            EquivocationError: if more than f ranks are proved to be faulty.

        """
        while True:
            before, accepted = self.proved, {}
            for (teller, subject), said in statements.items():
                if teller in self.proved:
                    continue
                value = self.accepted(said)
                if value is None or said.get(teller) != value:
                    self.prove([teller])
                    continue
                accepted[teller, subject] = value
                for rank, other in said.items():
                    if other != value and rank not in self.proved:
                        self.add(rank, teller)
            if self.proved == before:
                return accepted
