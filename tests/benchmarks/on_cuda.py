"""Does all of it work on a GPU, and how fast is it there?

One command on one GPU, about ten minutes, without a network: every rule, attack and dtype against the CPU, training by
Lightning in every precision, processes that share the GPU, times as parts of its memory's bandwidth, whole steps
against stock DDP, and what makes the processor wait. Each section prints a table and writes it to a CSV file. What
fails is printed and does not keep the rest from running; the exit code is then 1. `--device cpu --small` tries the
script itself where there is no GPU. Runs from a source tree with torch 2.11 to 2.13.
"""

import argparse
import os
import time
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import import_module
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from harness import Table, be_quiet

SECTIONS = ["correctness", "training", "processes", "protection", "times", "waits", "steps"]


class Section:
    """What one section needs: where it runs, its table, and a place for failures.

    Args:
        name: of the section and of its CSV file.
        device: "cuda" or "cpu".
        small: whether to try the script only.
        folder: for the CSV file.

    """

    def __init__(self, name: str, device: str, small: bool, folder: Path) -> None:
        self.name = name
        self.device = torch.device(device)
        self.small = small
        self.folder = folder
        self.failures: list[str] = []

    def table(self, columns: dict[str, str], suffix: str = "") -> Table:
        return Table(columns, self.folder / f"cuda_{self.name}{suffix}.csv")

    def expect(self, succeeded: bool, what: str) -> str:
        """Note a failure unless it succeeded; return a word for the table."""
        if not succeeded:
            self.failures.append(what)
        return "yes" if succeeded else "NO"

    @contextmanager
    def attempt(self, what: str) -> Iterator[None]:
        """Print what is raised within the block, note it as a failure, and go on."""
        try:
            yield
        except Exception:
            traceback.print_exc()
            print(f"FAILED: {self.name}: {what}", flush=True)
            self.failures.append(what)


def synchronize(device: torch.device) -> None:
    """Wait for the device."""
    if device.type == "cuda":
        torch.cuda.synchronize()


def add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda")
    parser.add_argument("--small", action="store_true", help="sizes that take two cores a minute, to try the script")
    parser.add_argument("--only", nargs="+", choices=SECTIONS, default=SECTIONS)
    parser.add_argument("--out", type=Path, default=Path("."), help="folder for the CSV files")


def run(arguments: argparse.Namespace) -> None:
    arguments.out.mkdir(parents=True, exist_ok=True)
    # Differences from the CPU should be this package's, not TensorFloat-32's.
    torch.backends.cudnn.allow_tf32 = False
    if arguments.device == "cpu":
        torch.set_num_threads(1)  # the tensors are small
    print(f"torch {torch.__version__}, {_name(arguments.device)}", flush=True)
    failures: list[str] = []
    for name in arguments.only:
        section, start = Section(name, arguments.device, arguments.small, arguments.out), time.perf_counter()
        print(f"\n## {name}\n", flush=True)
        # A Trainer leaves variables that make later ones believe they are its ranks.
        with section.attempt("the section"), mock.patch.dict(os.environ):
            module: Any = import_module(f"cuda_{name}")
            be_quiet()  # after the imports: Lightning's own sets its loggers' levels
            module.run(section)
        failures += [f"{name}: {failure}" for failure in section.failures]
        print(f"\n{name}: {time.perf_counter() - start:.0f} s, {len(section.failures)} failures", flush=True)
    if failures:
        print("\nFailures:", *failures, sep="\n- ", flush=True)
        raise SystemExit(1)


def _name(device: str) -> str:
    if device == "cpu":
        return "CPU"
    properties = torch.cuda.get_device_properties(0)
    return f"{properties.name}, {properties.total_memory / 2**30:.0f} GiB"
