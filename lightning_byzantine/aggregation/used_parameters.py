"""Which parameters a step has used."""

from functools import partial

from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

__all__ = ["UsedParameters"]


class UsedParameters:
    """Notes which parameters get a gradient, in every backward pass, synchronized or not, until :meth:`take`.

    With ``find_unused_parameters``, DDP notes the same, and does not touch the gradients of parameters that no rank has
    used: not those that are None, and not those that an earlier step has left. What it has noted is private to it.

    Args:
        parameters: the parameters, by name. Those that are frozen now always count as used.

    Example:
        >>> import torch
        >>> parameters = {name: nn.Parameter(torch.ones(1)) for name in ("weight", "bias")}
        >>> used = UsedParameters(parameters)
        >>> parameters["bias"].sum().backward()
        >>> sorted(used.take()), sorted(used.take())
        (['bias'], [])

    """

    def __init__(self, parameters: dict[str, nn.Parameter]) -> None:
        tracked = {name: parameter for name, parameter in parameters.items() if parameter.requires_grad}
        self._always = frozenset(parameters) - frozenset(tracked)
        self._noted: set[str] = set()
        # On a parameter, these run before DDP's own, which may be what completes a step's last bucket.
        self._handles: list[RemovableHandle] = [
            parameter.register_post_accumulate_grad_hook(partial(self._note, name))  # type: ignore[no-untyped-call]
            for name, parameter in tracked.items()
        ]

    def take(self) -> frozenset[str]:
        """Return the names of parameters used since the last call."""
        used, self._noted = self._always | self._noted, set()
        return used

    def remove(self) -> None:
        """Stop to take notes."""
        for handle in self._handles:
            handle.remove()

    def _note(self, name: str, parameter: Tensor) -> None:
        self._noted.add(name)
