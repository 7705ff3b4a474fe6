"""Runs the cells of a grid, several at a time, and resumes after an interruption."""

import json
import multiprocessing
import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path
from typing import Any

from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from reproduction.grid import Cell
from reproduction.training import RESULT, train_and_write, unfinished_folder


class CellError(RuntimeError):
    """A cell that could not be trained."""


def run_cells(
    cells: Sequence[Cell],
    folder: Path,
    jobs: int,
    work: Callable[[Cell, Path], None] = train_and_write,
) -> list[dict[str, Any]]:
    """Train the unfinished cells, each in its own process, and return the results of all.

    Args:
        cells: of a grid.
        folder: where each finished cell has a folder.
        jobs: number of processes at a time.
        work: what a process does; it creates the given folder, atomically at the end.

    Returns:
        For each cell its labels, ``accuracies`` and ``seconds``.

    Raises:
        CellError: at the end, after all other cells, if cells failed.

    """
    folder.mkdir(parents=True, exist_ok=True)
    distinct = {cell.key: cell for cell in cells}
    waiting = [cell for key, cell in distinct.items() if not (folder / key / RESULT).is_file()]
    waiting.sort(key=lambda cell: cell.seed)  # so that an interrupted grid is complete for the first seeds
    # Processes fork from a server that has imported all that a cell needs, and has done nothing else. It finds modules
    # through PYTHONPATH, not through this process's sys.path.
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["reproduction.training"])
    paths = [str(Path(__file__).parents[1]), *filter(None, [os.environ.get("PYTHONPATH")])]
    os.environ["PYTHONPATH"] = os.pathsep.join(paths)

    def run(cell: Cell) -> None:
        process = context.Process(target=work, args=(cell, folder / cell.key))
        process.start()
        process.join()
        if not (folder / cell.key / RESULT).is_file():
            log = unfinished_folder(folder / cell.key) / "log.txt"
            raise CellError(f"{cell}: ended with exit code {process.exitcode}; see {log}")

    failures = []
    with _progress() as progress, ThreadPoolExecutor(jobs) as pool:
        bar = progress.add_task("cells", total=len(distinct), completed=len(distinct) - len(waiting))
        futures = {pool.submit(run, cell): cell for cell in waiting}
        try:
            for future in as_completed(futures):
                if isinstance(error := future.exception(), CellError):
                    failures.append(str(error))
                    progress.console.print(f"failed: {error}", highlight=False, soft_wrap=True)
                elif error is not None:
                    raise error
                else:
                    accuracy = _result(futures[future], folder)["accuracies"][-1]
                    progress.console.print(f"{accuracy:.4f}  {futures[future]}", highlight=False, soft_wrap=True)
                progress.advance(bar)
        except BaseException:
            # Running cells end by the same interruption, or finish.
            pool.shutdown(wait=False, cancel_futures=True)
            raise
    if failures:
        raise CellError(f"{len(failures)} of {len(distinct)} cells failed; start again to repeat them")
    return [_result(cell, folder) for cell in cells]


def _progress() -> Progress:
    columns = (BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TextColumn("left"), TimeRemainingColumn())
    # A cell may take longer than half a minute, over which rich estimates the speed by default.
    return Progress(TextColumn("{task.description}"), *columns, speed_estimate_period=3600)


def _result(cell: Cell, folder: Path) -> dict[str, Any]:
    # Labels may have changed since the cell was trained.
    return json.loads((folder / cell.key / RESULT).read_text()) | cell.labels
