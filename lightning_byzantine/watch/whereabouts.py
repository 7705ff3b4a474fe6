"""Where a rank is in the run, as it states it to the others."""

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace

__all__ = ["Whereabouts", "find_desynchronized"]

_NUM_KEPT = 16  # more collectives than waiting ranks can be apart
_MAX_LENGTH = 200  # characters of a place


@dataclass(frozen=True)
class Whereabouts:
    """Where a rank is in the run.

    Args:
        beats: grows while the process lives.
        entered: number of collectives that it has entered.
        places: what the last of these are for, oldest first.
        waits: whether it is still in the last.
        has_ended: whether the rank has left the run, well or with an error.
        ports: local ports of its connections.

    Example:
        >>> here = Whereabouts().entering("backward of batch 0").entering("backward of batch 1")
        >>> here.entered, here.place(1), here.place(3)
        (2, 'backward of batch 0', None)
        >>> Whereabouts.decode(here.encode()) == here
        True

    """

    beats: int = 0
    entered: int = 0
    places: tuple[str, ...] = ()
    waits: bool = False
    has_ended: bool = False
    ports: tuple[int, ...] = ()

    def entering(self, place: str) -> "Whereabouts":
        """Return the same with one more collective."""
        places = (*self.places[1 - _NUM_KEPT :], place[:_MAX_LENGTH])
        return replace(self, entered=self.entered + 1, places=places, waits=True)

    def retracting(self) -> "Whereabouts":
        """Return the same without the last collective, because nothing was sent in it."""
        return replace(self, entered=self.entered - 1, places=self.places[:-1])

    def place(self, number: int) -> str | None:
        """Return what the first, second, ... collective is for; None if it is not known."""
        since = self.entered - number
        return self.places[-1 - since] if 0 <= since < len(self.places) else None

    def encode(self) -> str:
        """Return this as text."""
        return json.dumps(asdict(self))

    @classmethod
    def decode(cls, text: bytes | str) -> "Whereabouts":
        """Return what :meth:`encode` was called on; where nothing is known, if another rank has written other text."""
        try:
            values = json.loads(text)
            places = tuple(str(place)[:_MAX_LENGTH] for place in values["places"])[-_NUM_KEPT:]
            return cls(
                beats=int(values["beats"]),
                entered=int(values["entered"]),
                places=places,
                waits=bool(values["waits"]),
                has_ended=bool(values["has_ended"]),
                ports=tuple(int(port) for port in values["ports"]),
            )
        except (KeyError, OverflowError, RecursionError, TypeError, ValueError):
            return cls()


def find_desynchronized(ranks: Sequence[Whereabouts]) -> list[str] | None:
    """Return the different collectives in which ranks are, one for each; None if they go the same way.

    All ranks enter the same collectives in the same order, or wait for ever. So they are compared at the last one that
    all have entered.

    Args:
        ranks: where each rank is.

    Example:
        >>> start = Whereabouts().entering("start of batch 5")
        >>> find_desynchronized([start.entering("backward of batch 5"), start])
        >>> find_desynchronized([start.entering("backward of batch 5"), start.entering("end of the run")])
        ['backward of batch 5', 'end of the run']

    """
    common = min(rank.entered for rank in ranks)
    places = [place for rank in ranks if (place := rank.place(common)) is not None]
    return places if len(places) == len(ranks) and len(set(places)) > 1 else None
