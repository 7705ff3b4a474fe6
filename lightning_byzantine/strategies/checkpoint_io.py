"""Checkpoints that are whole or not there."""

import os
from pathlib import Path
from typing import Any

import torch
from lightning.fabric.plugins.io import TorchCheckpointIO
from lightning.fabric.utilities.cloud_io import _is_local_file_protocol, get_filesystem
from lightning.fabric.utilities.types import _PATH
from typing_extensions import override

__all__ = ["AtomicCheckpointIO"]


class AtomicCheckpointIO(TorchCheckpointIO):
    """Lightning's checkpoints, but the good file stays until the new one is on the disk.

    Lightning writes to the system's folder for temporary files and moves from there, which is a copy where that folder
    is on another file system; who dies then leaves a torso in the place of the checkpoint. Here the new file is written
    next to the old one, flushed to the disk, and renamed. Remote file systems are left to Lightning.

    Example:
        >>> from tempfile import TemporaryDirectory
        >>> with TemporaryDirectory() as folder:
        ...     AtomicCheckpointIO().save_checkpoint({"epoch": 3}, f"{folder}/last.ckpt")
        ...     os.listdir(folder)
        ['last.ckpt']

    """

    @override
    def save_checkpoint(self, checkpoint: dict[str, Any], path: _PATH, storage_options: Any | None = None) -> None:
        if storage_options is not None or not _is_local_file_protocol(path):
            super().save_checkpoint(checkpoint, path, storage_options)
            return
        target = Path(get_filesystem(path)._strip_protocol(str(path)))
        target.parent.mkdir(parents=True, exist_ok=True)
        # Always the same name, so that what a killed process leaves gets overwritten, and none that looks like one of a
        # checkpoint to who searches for the last one.
        partial = target.with_name(f".{target.name}.partial")
        with partial.open("wb") as file:
            torch.save(checkpoint, file)
            file.flush()
            os.fsync(file.fileno())
        partial.replace(target)
        folder = os.open(target.parent, os.O_RDONLY)
        try:
            os.fsync(folder)  # or the rename may get lost with the power
        finally:
            os.close(folder)
