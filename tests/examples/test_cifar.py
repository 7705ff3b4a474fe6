"""CIFAR-10: files as the public archive has them, and what must not be read from them."""

import csv
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import reproduce
import torch
from cifar import Cifar10Data, _augmented
from reproduction.networks import ResNet18

FILES = [*(f"data_batch_{number}" for number in range(1, 6)), "test_batch"]


def archive(folder: Path) -> Path:
    folder = folder / "cifar-10-batches-py"
    folder.mkdir()
    for number, name in enumerate(FILES):
        pixels = np.random.default_rng(number).integers(256, size=(4, 3072), dtype=np.uint8)
        pixels[0, :1024], pixels[0, 1024:] = 255, 0  # a red image
        write(folder / name, {b"data": pixels, b"labels": [0, 1, 2, 9], b"batch_label": b"some"})
    return folder


def write(path: Path, content: Any) -> None:
    path.write_bytes(pickle.dumps(content, protocol=2))


def test_reads_the_folder(tmp_path: Path) -> None:
    data = Cifar10Data(str(archive(tmp_path)), validation=0)
    data.prepare_data()
    data.setup("fit")
    images, labels = data.test_set[:]
    assert len(data.train_set) == 20
    assert images.shape == (4, 3, 32, 32)
    assert labels.tolist() == [0, 1, 2, 9]
    for channel, others in ((0, "above"), (1, "below"), (2, "below")):
        assert (images[0, channel] > 0).all() == (others == "above")
    # Each channel of the training images was standardised by itself.
    pixels = data.train_set[:][0]
    torch.testing.assert_close(pixels.mean(dim=(0, 2, 3)), torch.zeros(3), atol=1e-5, rtol=0)
    torch.testing.assert_close(pixels.std(dim=(0, 2, 3), correction=0), torch.ones(3))


def test_reads_an_npz(tmp_path: Path) -> None:
    images, labels = np.zeros((5, 32, 32, 3), np.uint8), np.arange(5)[:, None]
    images[::2] = 255
    np.savez(tmp_path / "cifar10.npz", x_train=images, y_train=labels, x_test=images, y_test=labels)
    data = Cifar10Data(str(tmp_path / "cifar10.npz"), validation=0)
    data.prepare_data()
    data.setup("fit")
    assert data.test_set[:][0].shape == (5, 3, 32, 32)
    assert data.test_set[:][1].tolist() == [0, 1, 2, 3, 4]


def test_says_how_to_fetch_what_is_missing(tmp_path: Path) -> None:
    folder = archive(tmp_path)
    (folder / "data_batch_3").unlink()
    with pytest.raises(FileNotFoundError, match=r"no .*data_batch_3. To fetch it: curl -LO https://.* && tar -xzf"):
        Cifar10Data(str(folder)).prepare_data()
    with pytest.raises(FileNotFoundError, match="To fetch it: curl"):
        Cifar10Data().prepare_data()


class Evil:
    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (Path("owned"),)


def test_runs_no_code_from_a_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    folder = archive(tmp_path)
    write(folder / "data_batch_2", {b"data": Evil(), b"labels": []})
    with pytest.raises(pickle.UnpicklingError, match="must only hold arrays, got"):
        Cifar10Data(str(folder)).load()
    assert not (tmp_path / "owned").exists()


def test_augmented_images_are_shifted_and_mirrored_by_at_most_two_pixels() -> None:
    torch.manual_seed(1)
    images = torch.zeros(200, 3, 32, 32)
    images[:, :, 10, 12] = 1
    places = {tuple(place) for place in _augmented(images)[:, 0].nonzero()[:, 1:].tolist()}
    columns = [*range(10, 15), *range(17, 22)]  # around 12, and around 31 - 12
    assert places == {(row, column) for row in range(8, 13) for column in columns}
    assert images.sum() == 600  # not written to


@pytest.mark.slow
def test_the_papers_config_trains_on_the_folder(tmp_path: Path) -> None:
    config = Path(reproduce.__file__).parent / "configs" / "reproduce" / "cifar10.yaml"
    arguments = ["--config", str(config), f"--data.path={archive(tmp_path)}", "--network.width=2", "--epochs=1"]
    arguments += ["--data.batch_size=2", '--settings=[{"num_workers": 5, "num_byzantine": 2}]', "--seeds=[1]"]
    arguments += ["--attacks={none: null}", "--rules={Mean: Mean}", "--accelerator=cpu", "--jobs=2"]
    reproduce.main([*arguments, "--out", str(tmp_path / "out")])
    with (tmp_path / "out" / "results.csv").open(newline="") as file:
        assert [row["estimator"] for row in csv.DictReader(file)] == ["worker momentum 0.9", "double momentum"]


def test_resnet18_has_the_size_of_the_original() -> None:
    network = ResNet18()
    assert sum(parameter.numel() for parameter in network.parameters()) == 11_173_962
    assert ResNet18(width=2)(torch.zeros(2, 3, 32, 32)).shape == (2, 10)
