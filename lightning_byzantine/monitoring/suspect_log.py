"""A file with one line for everything that becomes known about a worker."""

import json
from pathlib import Path
from typing import Literal

from lightning_byzantine.monitoring.suspect import Suspect

__all__ = ["Event", "log_suspect"]

Event = Literal["suspected", "cleared", "audited", "proved", "quarantined"]


def log_suspect(path: Path, event: Event, step: int, suspect: Suspect) -> None:
    """Append a JSON line with the event, the optimizer step, and the fields of the suspect to a file.

    Args:
        path: the file, which is created with its folder if necessary.
        event: what has happened.
        step: number of optimizer steps so far.
        suspect: the worker.

    Example:
        >>> import tempfile
        >>> path = Path(tempfile.mkdtemp()) / "suspects.jsonl"
        >>> suspect = Suspect(1, 1, "node7", "cpu", 9, None, 0, 2.5, None, 0, 0, shadow=False)
        >>> log_suspect(path, "suspected", 9, suspect)
        >>> line = json.loads(path.read_text())
        >>> line["event"], line["step"], line["worker"], line["distance"]
        ('suspected', 9, 1, 2.5)

    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a") as file:
        file.write(json.dumps({"event": event, "step": step, **suspect.as_dict()}) + "\n")
