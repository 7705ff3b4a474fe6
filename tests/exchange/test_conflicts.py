"""Who is blamed for what, against any statements of liars."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lightning_byzantine import EquivocationError
from lightning_byzantine.exchange.conflicts import Conflicts


@st.composite
def statements(draw: st.DrawFn) -> tuple[int, set[int], list[dict[tuple[int, str], dict[int, str]]]]:
    """Return m, the liars, and what ranks say in some rounds; honest ones say what they were told."""
    m = draw(st.integers(3, 8))
    liars = draw(st.sets(st.integers(0, m - 1), max_size=(m - 1) // 2))
    words = st.sampled_from("abcd")
    rounds = []
    for _ in range(draw(st.integers(1, 5))):
        told = {(teller, "row"): {rank: draw(words) for rank in range(m)} for teller in range(m)}
        for teller in set(range(m)) - liars:
            truth = told[teller, "row"][teller]
            for rank in set(range(m)) - liars:
                told[teller, "row"][rank] = truth
        rounds.append(told)
    return m, liars, rounds


@given(statements())
def test_nobody_honest_is_proved_to_lie_and_what_it_says_is_accepted(
    case: tuple[int, set[int], list[dict[tuple[int, str], dict[int, str]]]],
) -> None:
    m, liars, rounds = case
    conflicts = Conflicts(m, (m - 1) // 2)
    honest = set(range(m)) - liars
    for told in rounds:
        accepted = conflicts.judge(told)
        assert conflicts.proved <= liars
        assert not any(honest.issuperset(pair) for pair in conflicts.pairs)
        assert all(accepted[teller, "row"] == told[teller, "row"][teller] for teller in honest)
        assert {teller for teller, _ in accepted} == set(conflicts.voters)
        unsuspected = conflicts.unsuspected
        assert not unsuspected or honest.intersection(unsuspected)


def test_one_that_tells_all_something_else_is_proved_to_lie() -> None:
    conflicts = Conflicts(num_ranks=5, max_faulty=2)
    accepted = conflicts.judge({(3, "row"): dict(enumerate("abcde")), (1, "row"): dict.fromkeys(range(5), "x")})
    assert accepted == {(1, "row"): "x"}
    assert conflicts.proved == {3}
    assert conflicts.voters == [0, 1, 2, 4]
    assert conflicts.max_left == 1


def test_one_victim_could_be_the_liar_but_three_could_not() -> None:
    conflicts = Conflicts(num_ranks=5, max_faulty=2)
    for victim in (0, 2, 4):
        assert conflicts.proved == frozenset()
        said = dict.fromkeys(range(5), "x") | {victim: "y"}
        assert conflicts.judge({(1, "row"): said}) == ({(1, "row"): "x"} if victim != 4 else {})
    assert conflicts.proved == {1}


def test_a_framer_of_many_is_proved_to_lie() -> None:
    conflicts = Conflicts(num_ranks=5, max_faulty=2)
    told = {(teller, "row"): dict.fromkeys(range(5), "x") | {4: "y"} for teller in (0, 1, 2)}
    conflicts.judge(told)
    assert conflicts.proved == {4}


def test_what_one_says_of_itself_counts() -> None:
    conflicts = Conflicts(num_ranks=3, max_faulty=1)
    assert conflicts.judge({(0, "row"): {0: "y", 1: "x", 2: "x"}}) == {}
    assert conflicts.proved == {0}


def test_more_liars_than_there_may_be_are_an_error() -> None:
    conflicts = Conflicts(num_ranks=3, max_faulty=1)
    conflicts.prove([0])
    with pytest.raises(
        EquivocationError, match="ranks 0, 2 are proved to be faulty, but of 3 ranks no more than 1 may"
    ):
        conflicts.prove([2])


def test_those_found_otherwise_have_no_say_even_if_they_are_many() -> None:
    conflicts = Conflicts(num_ranks=5, max_faulty=1)
    conflicts.exclude([0, 4])
    assert (conflicts.voters, conflicts.max_left) == ([1, 2, 3], 0)
    said = {0: "y", 1: "x", 2: "x", 3: "x", 4: "y"}
    assert conflicts.judge({(1, "row"): said, (0, "row"): said}) == {(1, "row"): "x"}
