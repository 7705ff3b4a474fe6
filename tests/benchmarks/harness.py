"""What all benchmarks need: processes, turns, tables."""

import csv
import ctypes
import logging
import os
import time
import warnings
from collections.abc import Callable, Hashable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from statistics import median
from typing import Any, TypeVar
from unittest import mock

import rank_pool

Key = TypeVar("Key", bound=Hashable)


@contextmanager
def ranks(num_ranks: int, backend: str = "gloo") -> Iterator[rank_pool.RankPool]:
    """Give new processes, which may take half an hour to answer."""
    pool = rank_pool.RankPool(num_ranks, backend)
    with mock.patch.object(rank_pool, "TIMEOUT", 1800.0):
        try:
            yield pool
        finally:
            pool.close()


def in_new_ranks(num_ranks: int, function: Callable[..., Any], *arguments: Any) -> Any:
    """Return what a function returns on rank 0 of new processes, which nothing is left in of what ran before."""
    with ranks(num_ranks) as pool:
        return pool.run(function, *arguments)[0]


def be_quiet() -> None:
    """Have Lightning say nothing in this process."""
    warnings.simplefilter("ignore")
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)


def by_turns(
    contenders: Mapping[Key, Callable[[], object]],
    turns: int,
    steps: int = 1,
    warm_up: int = 0,
    ready: Callable[[], object] = lambda: None,
) -> dict[Key, float]:
    """Run all contenders one after the other, again and again, so that a machine that slows down does so for all.

    Args:
        contenders: what to measure.
        turns: of each contender, beside a first one that is not counted.
        steps: calls in a turn that are counted.
        warm_up: calls at the beginning of each turn that are not counted.
        ready: is called before every call.

    Returns:
        The median of the seconds that a call takes.

    """
    seconds: dict[Key, list[float]] = {key: [] for key in contenders}
    for turn in range(turns + 1):
        for key, call in contenders.items():
            for index in range(warm_up + steps):
                ready()
                start = time.perf_counter()
                call()
                if turn > 0 and index >= warm_up:
                    seconds[key].append(time.perf_counter() - start)
    return {key: median(values) for key, values in seconds.items()}


def memory_of(step: Callable[[], object]) -> tuple[int, int]:
    """Return by how many bytes this process grows at most during a step, and how large it is between steps."""
    for _ in range(3):
        step()
    before = _resident()
    Path("/proc/self/clear_refs").write_text("5")  # forget the peak so far
    for _ in range(3):
        step()
    peak = next(int(line.split()[1]) for line in Path("/proc/self/status").read_text().splitlines() if "VmHWM" in line)
    return 1024 * peak - before, before


def _resident() -> int:
    # glibc keeps what was freed, such as the blocks from before DDP has rebuilt its buckets.
    ctypes.CDLL("libc.so.6").malloc_trim(0)
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


class Table:
    """Prints rows in Markdown as they come, and writes them to a CSV file as well.

    Args:
        columns: the columns' names, and how to show their values: a format.
        path: the CSV file, which gets the values as they are; None for none.

    """

    def __init__(self, columns: dict[str, str], path: Path | None = None) -> None:
        self._columns = columns
        self._path = path
        print("|", " | ".join(columns), "|", flush=True)
        print("|" + "---|" * len(columns), flush=True)
        self._write(list(columns), mode="w")

    def add(self, *values: Any) -> None:
        """Print one row."""
        shown = [form.format(value) for form, value in zip(self._columns.values(), values, strict=True)]
        print("|", " | ".join(shown), "|", flush=True)
        self._write(values, mode="a")

    def _write(self, row: Any, mode: str) -> None:
        if self._path is not None:
            with self._path.open(mode, newline="") as file:
                csv.writer(file).writerow(row)
