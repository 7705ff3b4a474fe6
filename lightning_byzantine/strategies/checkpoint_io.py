"""Checkpoints that are written completely or not at all."""

import os
from pathlib import Path
from typing import Any

import torch
from lightning.fabric.plugins.io import TorchCheckpointIO
from typing_extensions import override

from lightning_byzantine.strategies.lightning_internals import _is_local_file_protocol, get_filesystem

__all__ = ["AtomicCheckpointIO"]


class AtomicCheckpointIO(TorchCheckpointIO):
    """Saves checkpoints so that the old file stays until the new one is on the disk.

    Lightning writes to the system's temporary folder and moves the file from there. If that folder is on another file
    system, moving is copying, and a process that dies meanwhile leaves an incomplete checkpoint. Here the new file is
    written next to the old one, flushed to the disk, and renamed. Remote file systems are left to Lightning.

    Example:
        >>> from tempfile import TemporaryDirectory
        >>> with TemporaryDirectory() as folder:
        ...     AtomicCheckpointIO().save_checkpoint({"epoch": 3}, f"{folder}/last.ckpt")
        ...     os.listdir(folder)
        ['last.ckpt']

    """

    @override
    def save_checkpoint(self, checkpoint: dict[str, Any], path: str | Path, storage_options: Any = None) -> None:
        if storage_options is not None or not _is_local_file_protocol(path):
            super().save_checkpoint(checkpoint, path, storage_options)
            return
        target = Path(get_filesystem(path)._strip_protocol(str(path)))
        target.parent.mkdir(parents=True, exist_ok=True)
        # Always the same name, so that the next checkpoint overwrites the file of a killed process; hidden and with
        # another suffix, so that a search for the last checkpoint does not find it.
        partial = target.with_name(f".{target.name}.partial")
        with partial.open("wb") as file:
            torch.save(checkpoint, file)
            file.flush()
            os.fsync(file.fileno())
        partial.replace(target)
        folder = os.open(target.parent, os.O_RDONLY)
        try:
            os.fsync(folder)  # otherwise a power failure can undo the rename
        finally:
            os.close(folder)
