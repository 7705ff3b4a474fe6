"""Few combinations of many options, among which every two options meet in all their values."""

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from itertools import combinations, product
from typing import Any

import pytest

Row = dict[str, Any]


def pairs(options: Mapping[str, Sequence[Any]], is_allowed: Callable[[Row], bool] = lambda row: True) -> list[Row]:
    """Return rows, one value of each option, such that every pair of values of every two options is in one of them.

    Most faults need no more than two options to show. Greedy, and the same rows every time.

    Args:
        options: for each option, its values.
        is_allowed: whether some values go together; it is asked about rows that are not complete, too.

    """
    if len(options) < 2:
        raise ValueError(f"pairs are of at least two options, got {list(options)}")
    indices = {name: range(len(values)) for name, values in options.items()}
    missing = {pair: None for two in combinations(options, 2) for pair in product(*map(_each(indices), two))}
    used: Counter[tuple[str, int]] = Counter()

    def values_of(row: dict[str, int]) -> Row:
        return {name: options[name][row[name]] for name in options if name in row}

    def complete(row: dict[str, int]) -> dict[str, int] | None:
        """Add the values by which most pairs are new; None if what is there goes together with none."""
        if not is_allowed(values_of(row)):
            return None
        rest = [name for name in options if name not in row]
        if not rest:
            return row

        def rank(choice: tuple[str, int]) -> tuple[int, int]:
            return -sum(pair in missing for pair in _pairs_of(options, {**row, choice[0]: choice[1]})), used[choice]

        found = (complete({**row, rest[0]: index}) for _, index in sorted(_each(indices)(rest[0]), key=rank))
        return next((whole for whole in found if whole is not None), None)

    rows = []
    while missing:
        pair = next(iter(missing))
        row = complete(dict(pair))
        if row is None:  # these two don't go together
            del missing[pair]
            continue
        rows.append(values_of(row))
        used.update(row.items())
        for pair in _pairs_of(options, row):
            missing.pop(pair, None)
    return rows


def pairwise(*, indirect: Sequence[str] = (), **options: Sequence[Any]) -> pytest.MarkDecorator:
    """Parametrize a test by all combinations of options; those beyond a table of :func:`pairs` are marked slow."""
    indices = {name: range(len(values)) for name, values in options.items()}
    table = {tuple(row.values()) for row in pairs(indices)}
    rows = []
    for row in product(*indices.values()):
        values = [options[name][index] for name, index in zip(options, row, strict=True)]
        marks = () if row in table else pytest.mark.slow
        rows.append(pytest.param(*values, marks=marks, id="-".join(map(_id, values))))
    return pytest.mark.parametrize(tuple(options), rows, indirect=list(indirect))


def _each(indices: Mapping[str, range]) -> Callable[[str], list[tuple[str, int]]]:
    return lambda name: [(name, index) for index in indices[name]]


def _pairs_of(options: Mapping[str, Any], row: dict[str, int]) -> list[tuple[Any, ...]]:
    return list(combinations([(name, row[name]) for name in options if name in row], 2))


def _id(value: Any) -> str:
    return value.__name__ if isinstance(value, type) else " ".join(str(value).split())
