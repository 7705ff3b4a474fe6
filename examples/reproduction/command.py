"""The command line that ``examples/reproduce.py`` and ``examples/tuning.py`` share."""

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from jsonargparse import ArgumentParser, Namespace
from jsonargparse.typing import PositiveInt

from reproduction.grid import GRID_ARGUMENTS, Grid, cells, check
from reproduction.results import write_csv
from reproduction.runner import CellError, run_cells


def grid_parser(description: str | None, out: str) -> ArgumentParser:
    """Return a parser of a grid's YAML, and of options that override it.

    Args:
        description: of the command.
        out: the default of ``--out``.

    """
    parser = ArgumentParser(description=description)
    parser.add_argument("--config", action="config", help="YAML of the grid; options after it override it")
    parser.add_class_arguments(Grid)
    parser.add_argument("--out", default=out, help="output folder")
    parser.add_argument(
        "--jobs", type=PositiveInt, default=os.cpu_count() or 1, help="how many cells to train at a time"
    )
    return parser


def run_grid(parser: ArgumentParser, options: Namespace) -> list[dict[str, Any]]:
    """Train unfinished cells, write ``results.csv``, and return all results; exit on errors."""
    made = parser.instantiate(options)
    try:
        check(Grid(**{name: made[name] for name in GRID_ARGUMENTS}))
    except (ValueError, OSError) as error:
        parser.error(str(error))
    folder = Path(options.out)
    try:
        results = run_cells(cells(options), folder / "cells", options.jobs)
    except CellError as error:
        raise SystemExit(str(error)) from None
    except KeyboardInterrupt:
        raise SystemExit("interrupted; run the same command again to train the unfinished cells") from None
    write_csv(results, folder / "results.csv")
    return results


def announce(paths: Sequence[Path]) -> None:
    """Print the paths that were written."""
    print("\n".join(f"wrote {path}" for path in paths))
