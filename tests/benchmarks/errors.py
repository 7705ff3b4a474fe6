"""What every rank says when one of three goes another way than the others or fails, and how long after.

Starts the three as a user does, by Lightning's launcher and by torchrun, once for every fault of tests/parting.py.
"""

import argparse
from pathlib import Path
from tempfile import TemporaryDirectory

from harness import Table
from parting import CASES, Case, Outcome, outcomes_of_processes

LAUNCHERS = ["lightning", "torchrun"]


def add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--launchers", nargs="+", default=LAUNCHERS, choices=LAUNCHERS)
    parser.add_argument("--faults", nargs="+", default=sorted({case.fault for case in CASES}), metavar="FAULT")
    parser.add_argument("--csv", type=Path)


def run(arguments: argparse.Namespace) -> None:
    columns = ["fault", "on rank", "that rank says", "the others say", "seconds until the last says it"]
    table = Table(dict.fromkeys(columns, "{}"), arguments.csv)
    for case in CASES:
        if case.fault not in arguments.faults:
            continue
        seconds: dict[tuple[str, str], list[str]] = {}
        for launcher in arguments.launchers:
            own, others, last = start(case, launcher)
            seconds.setdefault((own, others), []).append(f"{launcher} {last:.1f}")
        for (own, others), times in seconds.items():
            table.add(case.fault, "all" if case.rank is None else case.rank, own, others, ", ".join(times))


def start(case: Case, launcher: str) -> tuple[str, str, float]:
    """Return what the faulty rank says, what the others say, and after how many seconds the last has said it."""
    with TemporaryDirectory() as folder:
        outcomes = outcomes_of_processes(case, launcher, Path(folder))
        checkpoints = len(list(Path(folder).glob("*.ckpt")))
    said = [describe(outcome) for outcome in outcomes]
    own = said.pop(case.rank or 0)
    others = "the same" if set(said) == {own} else " or ".join(sorted(set(said)))
    own += f", {checkpoints} checkpoint" if "SIGTERM" in case.fault else ""
    return own, others, max(outcome.seconds for outcome in outcomes)


def describe(outcome: Outcome) -> str:
    # Without what is the same in all errors about different collectives, and without quotes that end those of Markdown.
    message = outcome.message.partition(" Do all ranks")[0].replace("`", "'")
    return f"`{outcome.error}: {message}`" if message else f"`{outcome.error}`"
