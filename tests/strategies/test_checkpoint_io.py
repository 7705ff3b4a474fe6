"""A checkpoint is whole, whenever the process that writes it dies."""

import os
import signal
from pathlib import Path
from typing import IO, Any
from unittest import mock

import pytest
import torch
from lightning.pytorch import Trainer
from lightning.pytorch.plugins.io import AsyncCheckpointIO, TorchCheckpointIO
from rank_pool import process_context

from lightning_byzantine import ByzantineDDPStrategy
from lightning_byzantine.strategies.checkpoint_io import AtomicCheckpointIO


class Dies:
    """A file that takes some bytes, and then has the process killed."""

    def __init__(self, file: IO[bytes], left: int) -> None:
        self.file, self.left = file, left

    def write(self, data: Any) -> int:
        if len(data) > self.left:
            self.file.write(bytes(data)[: self.left])
            self.file.flush()
            os.kill(os.getpid(), signal.SIGKILL)
        self.left -= len(data)
        return self.file.write(data)

    def flush(self) -> None:
        self.file.flush()


def save_twice(path: Path, num_bytes: int) -> None:
    """Save, then die in the middle of saving again."""
    AtomicCheckpointIO().save_checkpoint({"values": torch.ones(10_000)}, path)
    save = torch.save
    with mock.patch("torch.save", lambda value, file: save(value, Dies(file, num_bytes))):
        AtomicCheckpointIO().save_checkpoint({"values": torch.zeros(10_000)}, path)


@pytest.mark.parametrize("num_bytes", [0, 1000, 39_000])
def test_the_old_checkpoint_survives_a_kill_during_the_new_one(tmp_path: Path, num_bytes: int) -> None:
    path = tmp_path / "last.ckpt"
    process = process_context().Process(target=save_twice, args=(path, num_bytes))
    process.start()
    process.join(120)
    assert process.exitcode == -signal.SIGKILL
    assert torch.equal(AtomicCheckpointIO().load_checkpoint(path)["values"], torch.ones(10_000))
    assert [file.name for file in tmp_path.glob("*.ckpt")] == ["last.ckpt"]
    # The unfinished file is overwritten by the next checkpoint.
    AtomicCheckpointIO().save_checkpoint({"values": torch.full((3,), 7.0)}, path)
    assert AtomicCheckpointIO().load_checkpoint(path)["values"].tolist() == [7, 7, 7]
    assert os.listdir(tmp_path) == ["last.ckpt"]


def test_makes_folders_and_takes_addresses_of_files(tmp_path: Path) -> None:
    AtomicCheckpointIO().save_checkpoint({"epoch": 3}, f"file://{tmp_path}/new/last.ckpt")
    assert torch.load(tmp_path / "new" / "last.ckpt") == {"epoch": 3}
    umask = os.umask(0)
    os.umask(umask)
    assert (tmp_path / "new" / "last.ckpt").stat().st_mode & 0o777 == 0o666 & ~umask


def test_leaves_other_file_systems_to_lightning() -> None:
    AtomicCheckpointIO().save_checkpoint({"epoch": 3}, "memory://folder/last.ckpt")
    assert AtomicCheckpointIO().load_checkpoint("memory://folder/last.ckpt") == {"epoch": 3}


def test_is_what_the_strategy_saves_by_unless_told_otherwise() -> None:
    def used(**arguments: object) -> object:
        return Trainer(accelerator="cpu", devices=3, logger=False, **arguments).strategy.checkpoint_io

    class Own(TorchCheckpointIO):
        pass

    assert isinstance(used(strategy=ByzantineDDPStrategy()), AtomicCheckpointIO)
    assert type(used(strategy=ByzantineDDPStrategy(), plugins=[Own()])) is Own
    assert type(used(strategy=ByzantineDDPStrategy(checkpoint_io=Own()))) is Own
    wrapped = used(strategy=ByzantineDDPStrategy(), plugins=[AsyncCheckpointIO()])
    assert isinstance(wrapped, AsyncCheckpointIO)
    assert isinstance(wrapped.checkpoint_io, AtomicCheckpointIO)
