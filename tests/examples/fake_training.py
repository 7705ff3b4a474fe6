"""What stands for training in the processes of the runner's tests: a module that is quick to import."""

import json
import os
import signal
from pathlib import Path

from reproduction.grid import Cell
from reproduction.training import RESULT, unfinished_folder


def finish(cell: Cell, folder: Path) -> None:
    unfinished = unfinished_folder(folder)
    unfinished.mkdir(parents=True, exist_ok=True)
    with (folder.parent.parent / "trained.txt").open("a") as file:
        file.write(f"{cell.key}\n")
    (unfinished / RESULT).write_text(json.dumps({"accuracies": [0.5, 0.75], "seconds": 1.0, "run": cell.run}))
    os.replace(unfinished, folder)


def die_half_way_once(cell: Cell, folder: Path) -> None:
    unfinished = unfinished_folder(folder)
    if cell.seed == 2 and not unfinished.exists():
        unfinished.mkdir(parents=True)
        (unfinished / RESULT).write_text('{"accuracies": [0.')
        os.kill(os.getpid(), signal.SIGKILL)
    finish(cell, folder)
