from itertools import combinations, product
from typing import Any

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st
from pairs import covering, pairwise

sizes = st.lists(st.integers(1, 4), min_size=2, max_size=6)


def options_of(lengths: list[int]) -> dict[str, range]:
    return {f"option {number}": range(length) for number, length in enumerate(lengths)}


@pytest.mark.parametrize("size", [2, 3])
@given(lengths=sizes)
def test_all_values_of_so_many_options_meet(lengths: list[int], size: int) -> None:
    assume(len(lengths) >= size)
    options = options_of(lengths)
    rows = covering(options, size)
    assert all(row.keys() == options.keys() for row in rows)
    for names in combinations(options, size):
        met = {tuple(row[name] for name in names) for row in rows}
        assert met == set(product(*(options[name] for name in names)))
    assert covering(options, size) == rows


def test_rows_are_few() -> None:
    assert len(covering(options_of([2] * 10))) <= 10
    assert len(covering(options_of([4, 4, 2, 2, 2]))) <= 18
    assert len(covering(options_of([4, 4, 2, 2, 2]), 3)) <= 36


@given(sizes)
def test_what_does_not_go_together_never_meets(lengths: list[int]) -> None:
    def is_allowed(row: dict[str, Any]) -> bool:
        return row.get("option 0") != 0 or row.get("option 1") != 0

    rows = covering(options_of(lengths), is_allowed=is_allowed)
    assert all(map(is_allowed, rows))
    met = {(row["option 0"], row["option 1"]) for row in rows}
    assert met == set(product(range(lengths[0]), range(lengths[1]))) - {(0, 0)}


def test_what_only_triples_need_is_slow() -> None:
    mark = pairwise(one=[1, 2], two=[[], "b"], three=[int, None])
    names, cases = mark.args
    assert names == ("one", "two", "three")
    assert sorted(map(str, (case.values for case in cases))) == sorted(
        map(str, product([1, 2], [[], "b"], [int, None]))
    )
    assert [[mark.name for mark in case.marks] for case in cases] == 4 * [[]] + 4 * [["slow"]]
    assert cases[0].id == "1-[]-int"


def test_options_are_as_many_as_shall_meet() -> None:
    with pytest.raises(ValueError, match=r"at least size=2, got \['one'\]"):
        covering({"one": [1, 2]})
