"""A file with one line for every change of suspicion."""

import json
from pathlib import Path
from typing import Literal

from lightning_byzantine.monitoring.suspect import Suspect

__all__ = ["SuspectLog"]


class SuspectLog:
    """Appends JSON lines to a file, which is created with the first line.

    Args:
        path: the file. Its folder is created if necessary.

    Example:
        >>> import tempfile
        >>> path = Path(tempfile.mkdtemp()) / "suspects.jsonl"
        >>> suspect = Suspect(1, 1, "node7", "cpu", 9, None, 0, 2.5, None, 0, 1, 0, 0, shadow=False)
        >>> SuspectLog(path).write("suspected", 9, suspect)
        >>> line = json.loads(path.read_text())
        >>> line["event"], line["step"], line["worker"], line["distance"]
        ('suspected', 9, 1, 2.5)

    """

    def __init__(self, path: Path) -> None:
        self.path = path

    def write(self, event: Literal["suspected", "cleared", "quarantined"], step: int, suspect: Suspect) -> None:
        """Append a line with the event, the optimizer step, and the fields of the suspect."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with self.path.open("a") as file:
            file.write(json.dumps({"event": event, "step": step, **suspect.as_dict()}) + "\n")
