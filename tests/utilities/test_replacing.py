import itertools
from contextlib import ExitStack

import pytest

from lightning_byzantine.utilities.replacing import replaced


class Door:
    def knock(self) -> str:
        return "class"

    def open(self) -> str:
        return "class"


@pytest.mark.parametrize("patched", [False, True])
@pytest.mark.parametrize("order", list(itertools.permutations(range(3))))
def test_what_was_there_comes_back_in_whatever_order_replacements_end(order: tuple[int, ...], patched: bool) -> None:
    door = Door()
    if patched:
        door.knock = lambda: "user"  # type: ignore[method-assign]
    stacks = [ExitStack() for _ in range(3)]
    for index, stack in enumerate(stacks):
        stack.enter_context(replaced(door, knock=lambda index=index: str(index)))
    still = {0, 1, 2}
    for index in order:
        assert door.knock() == str(max(still))
        still.remove(index)
        stacks[index].close()
    assert door.knock() == ("user" if patched else "class")
    assert patched or vars(door) == {}


def test_other_attributes_and_other_owners_are_left_alone() -> None:
    first, second, stack = Door(), Door(), ExitStack()
    stack.enter_context(replaced(first, knock=lambda: "replaced"))
    with replaced(second, knock=lambda: "also"), replaced(first, open=lambda: "open"):
        stack.close()
        assert (first.knock(), first.open(), second.knock()) == ("class", "open", "also")
    assert vars(first) == vars(second) == {}


def test_an_error_ends_it_too() -> None:
    door = Door()
    with pytest.raises(KeyError), replaced(door, knock=lambda: "replaced"):
        raise KeyError
    assert door.knock() == "class"
