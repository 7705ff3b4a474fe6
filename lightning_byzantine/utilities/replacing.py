"""Methods of somebody else's object, replaced for a while."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

__all__ = ["replaced"]


@contextmanager
def replaced(owner: object, **attributes: Any) -> Iterator[None]:
    """Give an object other attributes, which go before those of its class, and take them back at the end.

    What the object itself had by these names, such as a method that the user has patched, comes back.

    Args:
        owner: whose attributes to replace.
        **attributes: the new ones, by name.

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
    patched.update(attributes)
    try:
        yield
    finally:
        for name in attributes:
            patched.pop(name, None)
        patched.update(before)
