"""What every rank says when one of three goes another way than the others or fails, and how long after.

Starts the three as a user does, by Lightning's launcher and by torchrun, once for every fault of tests/parting.py.
"""

import argparse
from pathlib import Path
from tempfile import TemporaryDirectory

from harness import Table
from parting import CASES, Case, Outcome, outcomes_of_processes


def add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--launchers", nargs="+", default=["lightning", "torchrun"], choices=["lightning", "torchrun"])
    parser.add_argument("--faults", nargs="+", default=[case.fault for case in CASES])
    parser.add_argument("--csv", type=Path)


def run(arguments: argparse.Namespace) -> None:
    columns = ["fault", "on rank", "started by", "that rank says", "the others say"]
    table = Table(dict.fromkeys(columns, "{}") | {"seconds until the last says it": "{:.1f}"}, arguments.csv)
    for case in CASES:
        for launcher in arguments.launchers:
            if case.fault in arguments.faults:
                table.add(*row(case, launcher))


def row(case: Case, launcher: str) -> list[object]:
    with TemporaryDirectory() as folder:
        outcomes = outcomes_of_processes(case, launcher, Path(folder))
        checkpoints = len(list(Path(folder).glob("*.ckpt")))
    faulty = outcomes[case.rank or 0]
    others = [outcome for rank, outcome in enumerate(outcomes) if rank != (case.rank or 0)]
    said = {describe(outcome) for outcome in others}
    saved = f", {checkpoints} checkpoint" if case.fault == "SIGTERM" else ""
    return [
        case.fault,
        "all" if case.rank is None else case.rank,
        launcher,
        describe(faulty) + saved,
        "the same" if said == {describe(faulty)} else " or ".join(sorted(said)),
        max(outcome.seconds for outcome in outcomes),
    ]


def describe(outcome: Outcome) -> str:
    return f"`{outcome.error}: {outcome.message}`" if outcome.message else f"`{outcome.error}`"
