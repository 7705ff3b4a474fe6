from itertools import combinations, product
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pairs import pairs, pairwise

sizes = st.lists(st.integers(1, 4), min_size=2, max_size=6)


def options_of(lengths: list[int]) -> dict[str, range]:
    return {f"option {number}": range(length) for number, length in enumerate(lengths)}


@given(sizes)
def test_every_two_values_of_every_two_options_meet(lengths: list[int]) -> None:
    options = options_of(lengths)
    rows = pairs(options)
    assert all(row.keys() == options.keys() for row in rows)
    for first, second in combinations(options, 2):
        assert {(row[first], row[second]) for row in rows} == set(product(options[first], options[second]))
    assert pairs(options) == rows


def test_rows_are_few() -> None:
    assert len(pairs(options_of([2] * 10))) <= 10
    assert len(pairs(options_of([4, 4, 2, 2, 2]))) <= 18


@given(sizes)
def test_what_does_not_go_together_never_meets(lengths: list[int]) -> None:
    def is_allowed(row: dict[str, Any]) -> bool:
        return row.get("option 0") != 0 or row.get("option 1") != 0

    rows = pairs(options_of(lengths), is_allowed)
    assert all(map(is_allowed, rows))
    met = {(row["option 0"], row["option 1"]) for row in rows}
    assert met == set(product(range(lengths[0]), range(lengths[1]))) - {(0, 0)}


def test_combinations_beyond_pairs_are_slow() -> None:
    mark = pairwise(one=[1, 2], two=[[], "b"], three=[int, None])
    names, cases = mark.args
    assert names == ("one", "two", "three")
    assert [case.values for case in cases] == list(product([1, 2], [[], "b"], [int, None]))
    assert sum(not case.marks for case in cases) == 4
    assert all([mark.name for mark in case.marks] in ([], ["slow"]) for case in cases)
    assert cases[0].id == "1-[]-int"


def test_pairs_are_of_two_options_at_least() -> None:
    with pytest.raises(ValueError, match="at least two options"):
        pairs({"one": [1, 2]})
