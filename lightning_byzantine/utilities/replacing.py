"""Temporary replacement of an object's methods."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

__all__ = ["replaced"]

# Owners, their new attributes and their old ones, in the order of the replacements.
_ACTIVE: list[tuple[object, dict[str, Any], dict[str, Any]]] = []


@contextmanager
def replaced(owner: object, **attributes: Any) -> Iterator[None]:
    """Set attributes of an object, which hide those of its class, and restore the object on exit.

    Attributes that the object had itself, such as a method that the user has patched, are restored. Several
    replacements of one attribute may end in any order.

    Args:
        owner: the object.
        **attributes: new attributes by name.

    Example:
        >>> class Door:
        ...     def knock(self):
        ...         return "who is there?"
        >>> door = Door()
        >>> with replaced(door, knock=lambda: "nobody is in"):
        ...     door.knock()
        'nobody is in'
        >>> door.knock()
        'who is there?'

    """
    patched = vars(owner)
    before = {name: patched[name] for name in attributes if name in patched}
    replacement = (owner, attributes, before)
    _ACTIVE.append(replacement)
    patched.update(attributes)
    try:
        yield
    finally:
        index = next(i for i, active in enumerate(_ACTIVE) if active is replacement)
        del _ACTIVE[index]
        for name in attributes:
            # A newer replacement of the same attribute must restore what was there before this one.
            newer = next((old for other, new, old in _ACTIVE[index:] if other is owner and name in new), patched)
            newer.pop(name, None)
            if name in before:
                newer[name] = before[name]
