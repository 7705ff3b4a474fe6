"""Medians of a few numbers, one for each worker, some of which are unknown."""

from collections.abc import Iterable
from math import nan
from statistics import median

__all__ = ["known_median", "multiples"]

# On lists of floats: for this few workers, a single tensor operation would take longer.


def known_median(values: Iterable[float]) -> float:
    """Return the median of the values that are not NaN; of an even number, the mean of the middle two.

    Args:
        values: any number of values; NaN where unknown.

    Returns:
        the median; NaN if no value is known.

    Example:
        >>> known_median([4.0, float("nan"), 1.0])
        2.5

    """
    known = [value for value in values if value == value]
    return median(known) if known else nan


def multiples(values: list[float]) -> list[float]:
    """Return the values as multiples of the median of the known ones; all NaN if that is 0.

    Example:
        >>> multiples([1.0, 2.0, 8.0])
        [0.5, 1.0, 4.0]

    """
    usual = known_median(values)
    return [value / usual if usual > 0 else nan for value in values]
