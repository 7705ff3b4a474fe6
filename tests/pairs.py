"""Few combinations of many options, among which every two, or three, options meet in all their values."""

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from itertools import combinations, product
from typing import Any

import pytest

Row = dict[str, Any]


def covering(
    options: Mapping[str, Sequence[Any]], size: int = 2, is_allowed: Callable[[Row], bool] = lambda row: True
) -> list[Row]:
    """Return rows, one value of each option, such that all values of every ``size`` options meet in one of them.

    Most faults need no more than two options to show. Greedy, and the same rows every time.

    Args:
        options: for each option, its values.
        size: 2 for pairs, 3 for triples; at most the number of options.
        is_allowed: whether some values go together; it is asked about rows that are not complete, too.

    """
    if len(options) < size:
        raise ValueError(f"options must be at least size={size}, got {list(options)}")
    indices = {name: range(len(values)) for name, values in options.items()}
    missing = {some: None for names in combinations(options, size) for some in product(*map(_each(indices), names))}
    used: Counter[tuple[str, int]] = Counter()

    def values_of(row: dict[str, int]) -> Row:
        return {name: options[name][row[name]] for name in options if name in row}

    def complete(row: dict[str, int]) -> dict[str, int] | None:
        """Add the values by which most meetings are new; None if what is there goes together with none."""
        if not is_allowed(values_of(row)):
            return None
        rest = [name for name in options if name not in row]
        if not rest:
            return row

        def rank(choice: tuple[str, int]) -> tuple[int, int]:
            whole = {**row, choice[0]: choice[1]}
            return -sum(some in missing for some in _meetings(options, whole, size)), used[choice]

        found = (complete({**row, rest[0]: index}) for _, index in sorted(_each(indices)(rest[0]), key=rank))
        return next((whole for whole in found if whole is not None), None)

    rows = []
    while missing:
        some = next(iter(missing))
        row = complete(dict(some))
        if row is None:  # these don't go together
            del missing[some]
            continue
        rows.append(values_of(row))
        used.update(row.items())
        for met in _meetings(options, row, size):
            missing.pop(met, None)
    return rows


def pairwise(*, indirect: Sequence[str] = (), **options: Sequence[Any]) -> pytest.MarkDecorator:
    """Parametrize a test such that every two options meet in all values; such that every three do is marked slow."""
    indices = {name: range(len(values)) for name, values in options.items()}
    two, three = ([tuple(row.values()) for row in covering(indices, min(size, len(options)))] for size in (2, 3))
    rows = []
    for row in [*two, *(row for row in three if row not in two)]:
        values = [options[name][index] for name, index in zip(options, row, strict=True)]
        marks = () if row in two else pytest.mark.slow
        rows.append(pytest.param(*values, marks=marks, id="-".join(map(_id, values))))
    return pytest.mark.parametrize(tuple(options), rows, indirect=list(indirect))


def _each(indices: Mapping[str, range]) -> Callable[[str], list[tuple[str, int]]]:
    return lambda name: [(name, index) for index in indices[name]]


def _meetings(options: Mapping[str, Any], row: dict[str, int], size: int) -> list[tuple[Any, ...]]:
    return list(combinations([(name, row[name]) for name in options if name in row], size))


def _id(value: Any) -> str:
    return value.__name__ if isinstance(value, type) else " ".join(str(value).split())
