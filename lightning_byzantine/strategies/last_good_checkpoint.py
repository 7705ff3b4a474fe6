"""Checkpoints of a model that has broken down, which must not replace the last good one."""

from pathlib import Path

import torch
from lightning.pytorch.utilities import rank_zero_warn
from torch import nn

from lightning_byzantine.strategies.lightning_internals import get_filesystem

__all__ = ["LastGoodCheckpoint"]


class LastGoodCheckpoint:
    """Decides what may be overwritten or removed, so that the last checkpoint with finite parameters stays.

    One with a non-finite parameter is written only where no other file is, and while the newest is such a one, no file
    is removed but others of them. Parameters that are not finite from the start, such as a mask, don't count, nor do
    those that are not trained.

    Args:
        module: what is saved.

    Example:
        >>> from tempfile import NamedTemporaryFile
        >>> layer = nn.Linear(1, 1)
        >>> last_good = LastGoodCheckpoint(layer)
        >>> with NamedTemporaryFile() as file:
        ...     last_good.may_write(file.name)
        True

    """

    def __init__(self, module: nn.Module) -> None:
        self._module = module
        self._exempt = {name for name, parameter in module.named_parameters() if not _is_finite(parameter)}
        self._broken_files: set[str] = set()
        self._is_broken = False
        self._has_warned = False

    def may_write(self, path: str | Path) -> bool:
        """Return whether the model as it is now may be saved there; warn if it is the first that may not."""
        broken = self._broken_parameter()
        self._is_broken = broken is not None
        if not self._is_broken:
            self._broken_files.discard(str(path))
            return True
        may_write = str(path) in self._broken_files or not get_filesystem(path).exists(str(path))
        if may_write:
            self._broken_files.add(str(path))
        self._warn(f"The parameter {broken!r} is not finite", "" if may_write else f" {path} is not overwritten, and")
        return may_write

    def may_remove(self, path: str | Path) -> bool:
        """Return whether the file may be removed."""
        return not self._is_broken or str(path) in self._broken_files

    def _broken_parameter(self) -> str | None:
        for name, parameter in self._module.named_parameters():
            if parameter.requires_grad and name not in self._exempt and not _is_finite(parameter):
                return name
        return None

    def _warn(self, problem: str, consequence: str) -> None:
        if not self._has_warned:
            rank_zero_warn(
                f"{problem}, so checkpoints do not replace those with finite parameters any more:{consequence} none of"
                " them is removed."
            )
        self._has_warned = True


def _is_finite(parameter: nn.Parameter) -> bool:
    return bool(torch.isfinite(parameter.detach()).all())
