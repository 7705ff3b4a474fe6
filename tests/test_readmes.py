"""The READMEs: their Python runs, their YAML is understood, their links lead somewhere, their commands name files.

The Python blocks of a file run in their order, in one namespace that begins with ``PREAMBLE``. Nothing is trained:
``Trainer.fit`` is replaced by a function that looks at its arguments.
"""

import re
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import lightning.pytorch as pl
import pytest
import torch
import yaml
from lightning.pytorch.accelerators import CUDAAccelerator, MPSAccelerator
from lightning.pytorch.cli import LightningCLI
from lightning.pytorch.demos.boring_classes import BoringDataModule, BoringModel
from lightning.pytorch.strategies import StrategyRegistry
from torch import nn

import lightning_byzantine.callbacks  # noqa: F401  # registers the class names
from lightning_byzantine import ByzantineDDPStrategy

ROOT = Path(__file__).parents[1]
FILES = [ROOT / "README.md", ROOT / "CHANGELOG.md", *sorted((ROOT / ".github").glob("*.md"))]
FILES += [path for room in ("examples", "lightning_byzantine", "tests") for path in sorted((ROOT / room).rglob("*.md"))]
LONGEST_README = 250


def preamble() -> dict[str, Any]:
    """Return what a reader has: a model, data, and vectors of 9 workers."""
    return {
        "pl": pl,
        "torch": torch,
        "model": BoringModel(),
        "datamodule": BoringDataModule(),
        "vectors": torch.randn(9, 20, generator=torch.Generator().manual_seed(0)),
        "inputs": torch.ones(4, 32),
        "targets": torch.zeros(4, 2),
        "loss_function": nn.functional.mse_loss,
    }


def blocks(path: Path, language: str) -> list[str]:
    """Return the fenced blocks of a language, without the indentation of a list they are in."""
    found = re.findall(rf"^( *)```{language}\n(.*?)^ *```$", path.read_text(), re.DOTALL | re.MULTILINE)
    return ["\n".join(line.removeprefix(indent) for line in text.splitlines()) for indent, text in found]


def without_blocks(path: Path) -> str:
    return re.sub(r"^ *```.*?^ *```$", "", path.read_text(), flags=re.DOTALL | re.MULTILINE)


def files_with(language: str) -> list[Path]:
    return [path for path in FILES if blocks(path, language)]


def name_of(path: Path) -> str:
    return str(path.relative_to(ROOT))


def anchors(path: Path) -> set[str]:
    """Return the anchors that GitHub gives to the headings of a file."""
    headings = re.findall(r"^#+ +(.*)$", without_blocks(path), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.fixture
def any_number_of_devices() -> Iterator[None]:
    """Have Trainers choose the CPU, which is as many devices as one asks for."""
    with (
        mock.patch.object(CUDAAccelerator, "is_available", return_value=False),
        mock.patch.object(MPSAccelerator, "is_available", return_value=False),
    ):
        yield


@pytest.mark.parametrize("path", files_with("python"), ids=name_of)
def test_python_blocks_run(path: Path, any_number_of_devices: None) -> None:
    fits = []

    def fit(trainer: pl.Trainer, model: pl.LightningModule, datamodule: pl.LightningDataModule) -> None:
        assert isinstance(trainer.strategy, ByzantineDDPStrategy)
        assert isinstance(model, pl.LightningModule)
        assert isinstance(datamodule, pl.LightningDataModule)
        fits.append(trainer)

    namespace = preamble()
    with mock.patch.object(pl.Trainer, "fit", fit):
        for number, block in enumerate(blocks(path, "python"), 1):
            exec(compile(block, f"{name_of(path)}, Python block {number}", "exec"), namespace)
    assert len(fits) == path.read_text().count("trainer.fit(")


def test_the_flag_survives_as_many_as_the_readme_says(any_number_of_devices: None) -> None:
    said = re.search(
        r'strategy="byzantine_ddp", devices=(\d+)\)  # survives (\d+) bad', (ROOT / "README.md").read_text()
    )
    assert said is not None
    strategy = pl.Trainer(strategy="byzantine_ddp", devices=int(said[1]), logger=False).strategy
    assert isinstance(strategy, ByzantineDDPStrategy)
    assert strategy.num_byzantine == int(said[2])


@pytest.mark.parametrize("path", files_with("yaml"), ids=name_of)
def test_yaml_blocks_are_understood(path: Path, any_number_of_devices: None, tmp_path: Path) -> None:
    for block in blocks(path, "yaml"):
        settings = yaml.safe_load(block)
        if "trainer" in settings:
            (tmp_path / "config.yaml").write_text(block)
            arguments = ["--config", str(tmp_path / "config.yaml")]
            cli = LightningCLI(BoringModel, BoringDataModule, run=False, save_config_callback=None, args=arguments)
            assert isinstance(cli.trainer.strategy, ByzantineDDPStrategy)


@pytest.mark.parametrize("path", files_with("bash"), ids=name_of)
def test_commands_can_be_read_by_a_shell(path: Path) -> None:
    for block in blocks(path, "bash"):
        parsed = subprocess.run(["bash", "-n"], input=block, text=True, capture_output=True)
        assert parsed.returncode == 0, f"{block}\n{parsed.stderr}"


@pytest.mark.parametrize("path", FILES, ids=name_of)
def test_commands_name_files_that_exist(path: Path) -> None:
    commands = [block.replace("\\\n", " ") for block in blocks(path, "bash")]
    commands += re.findall(r"`([^`\n]+)`", without_blocks(path))
    for word in " ".join(commands).split():
        if word.startswith(("examples/", "tests/", "lightning_byzantine/", ".ci/", ".github/")):
            assert (ROOT / word).exists(), word


# The changelog also has the names that went.
@pytest.mark.parametrize("path", [path for path in FILES if path.name != "CHANGELOG.md"], ids=name_of)
def test_strategies_are_registered(path: Path) -> None:
    names = re.findall(r"\bbyzantine_ddp(?:_[a-z_]+)?\b(?!\.)", path.read_text())
    assert set(names) <= set(StrategyRegistry.available_strategies())


@pytest.mark.parametrize("path", FILES, ids=name_of)
def test_links_lead_somewhere(path: Path) -> None:
    for link in re.findall(r"\]\(([^)\s]+)\)", without_blocks(path)):
        if re.match(r"[a-z]+:", link):
            continue
        file, _, anchor = link.partition("#")
        target = (path.parent / file).resolve() if file else path
        assert target.exists(), link
        assert target.is_relative_to(ROOT), link
        assert not anchor or anchor in anchors(target), link


def test_the_readme_is_read_to_its_end() -> None:
    assert len((ROOT / "README.md").read_text().splitlines()) <= LONGEST_README
