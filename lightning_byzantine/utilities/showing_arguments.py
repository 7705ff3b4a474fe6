"""Modules that show the arguments they were made with."""

from inspect import signature

from torch import nn

__all__ = ["ShowsArguments"]


class ShowsArguments(nn.Module):
    """A module whose ``repr`` shows the arguments of its constructor that it keeps under their own names.

    Example:
        >>> class Scaling(ShowsArguments):
        ...     def __init__(self, factor: float, mode: str = "row") -> None:
        ...         super().__init__()
        ...         self.factor, self.mode = factor, mode
        >>> Scaling(0.5)
        Scaling(factor=0.5, mode='row')

    """

    def extra_repr(self) -> str:
        """Show the arguments; submodules show themselves."""
        kept = [name for name in signature(type(self)).parameters if name in vars(self)]
        return ", ".join(f"{name}={getattr(self, name)!r}" for name in kept)
