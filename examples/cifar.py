"""The images of CIFAR-10."""

import pickle
from pathlib import Path
from typing import Any

import numpy as np
import torch
from images import Arrays, ImageData, load_archive
from torch import Tensor
from torch.nn.functional import pad

_URL = "https://www.cs.toronto.edu/~kriz/cifar-10-python.tar.gz"
_TRAIN = tuple(f"data_batch_{number}" for number in range(1, 6))
_PADDING = 2

# All names that the archive's files need.
_NAMES = {
    ("_codecs", "encode"),
    ("numpy", "dtype"),
    ("numpy", "ndarray"),
    ("numpy._core.multiarray", "_reconstruct"),
    ("numpy.core.multiarray", "_reconstruct"),
}


class Cifar10Data(ImageData):
    """60,000 colour images of 32 x 32 pixels; those for training are shifted by up to 2 pixels and mirrored at random.

    Args:
        path: the folder ``cifar-10-batches-py`` of the archive for Python, or an ``.npz`` in the layout of Keras
            (``x_train, y_train, x_test, y_test``).
        batch_size: images in one batch of one worker.
        partition: how to divide the training images among workers; see :class:`~images.ImageData`.
        validation: the fraction of the training images for validation; see :class:`~images.ImageData`.

    """

    def prepare_data(self) -> None:
        path = Path(self.path or "cifar-10-batches-py")
        needed = [path] if path.suffix == ".npz" else [path / name for name in (*_TRAIN, "test_batch")]
        if missing := [str(file) for file in needed if not file.is_file()]:
            raise FileNotFoundError(
                "path must be the folder cifar-10-batches-py of CIFAR-10, or an .npz of the same, but there is no"
                f" {missing[0]}. To fetch it: curl -LO {_URL} && tar -xzf cifar-10-python.tar.gz -C {path.parent}"
            )

    def load(self) -> Arrays:
        path = Path(self.path or "cifar-10-batches-py")
        if path.suffix == ".npz":
            return load_archive(path)
        images, labels = zip(*(_load_batch(path / name) for name in _TRAIN), strict=True)
        return np.concatenate(images), np.concatenate(labels), *_load_batch(path / "test_batch")

    def on_after_batch_transfer(self, batch: list[Tensor], dataloader_idx: int) -> list[Tensor]:
        if not self.trainer.training:
            return batch
        images, labels = batch
        return [_augmented(images), labels]


class _ArrayUnpickler(pickle.Unpickler):
    """Unpickles arrays, and nothing that could run code."""

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in _NAMES:
            raise pickle.UnpicklingError(f"a file of CIFAR-10 must only hold arrays, got {module}.{name}")
        return super().find_class(module, name)


def _load_batch(path: Path) -> tuple[np.ndarray, np.ndarray]:
    with path.open("rb") as file:
        batch = _ArrayUnpickler(file, encoding="bytes").load()
    return batch[b"data"].reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1), np.array(batch[b"labels"])


def _augmented(images: Tensor) -> Tensor:
    """Shift each image, padded with zeros, and mirror it with probability 1/2."""
    height, width = images.shape[-2:]
    padded = pad(images, (_PADDING,) * 4)
    shifted = []
    for image in padded:
        top, left = torch.randint(2 * _PADDING + 1, (2,)).tolist()
        view = image[:, top : top + height, left : left + width]
        shifted.append(view.flip(-1) if torch.rand(()) < 0.5 else view)
    return torch.stack(shifted)
