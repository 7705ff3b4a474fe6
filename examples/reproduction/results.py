"""Finished cells as a table, and their comparison with a reference."""

import csv
import os
import re
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import mean, stdev
from typing import Any

# Accepted difference in accuracy, or in standard deviations over the seeds if that is more.
_TOLERANCE = 0.03
_DEVIATIONS = 3


def write_csv(results: Sequence[Mapping[str, Any]], path: Path) -> None:
    """Write a row for each cell, with an accuracy for each epoch, atomically."""
    rows = [_row(result) for result in results]
    unfinished = path.with_name(f".{path.name}")
    with unfinished.open("w", newline="") as file:
        writer = csv.DictWriter(file, rows[0])
        writer.writeheader()
        writer.writerows(rows)
    os.replace(unfinished, path)


def num_attackers(result: Mapping[str, Any]) -> int:
    """Return the number of workers that attacked."""
    return 0 if result["run"]["attack"] is None else result["num_byzantine"]


def final_accuracies(results: Iterable[Mapping[str, Any]], *axes: str) -> dict[tuple[Any, ...], list[float]]:
    """Return the accuracies after the last epoch, grouped by these axes."""
    grouped = defaultdict(list)
    for result in results:
        grouped[tuple(result[axis] for axis in axes)].append(result["accuracies"][-1])
    return dict(grouped)


@dataclass(frozen=True)
class Comparison:
    """One cell and its reference.

    Attributes:
        cell: attack, method, rule, numbers of workers and of attackers, images in a worker's batch, learning rate,
            partition, the rule's f; None for any.
        ours: accuracies over the seeds.
        reference: mean accuracy of the reference.

    """

    cell: tuple[Any, ...]
    ours: tuple[float, ...]
    reference: float

    @property
    def difference(self) -> float:
        """Our mean minus the reference's."""
        return mean(self.ours) - self.reference

    @property
    def deviation(self) -> float:
        """The standard deviation over seeds; 0 for one seed."""
        return stdev(self.ours) if len(self.ours) > 1 else 0.0

    @property
    def agrees(self) -> bool:
        """Whether the difference is at most 0.03, or 3 standard deviations."""
        bound = max(_TOLERANCE, _DEVIATIONS * self.deviation)
        return abs(self.difference) <= bound + 1e-9  # decimal fractions are not exact


def compare(results: Sequence[Mapping[str, Any]], reference: Path) -> list[Comparison]:
    """Return the cells that the reference has too.

    Args:
        results: finished cells.
        reference: a CSV with the columns of :func:`write_csv`, of which the last accuracy is compared. Parameters in
            parentheses after the name of a rule or an attack are ignored, and so are numbers after a method's name.
            Without the column ``partition`` all its rows are IID; without ``num_byzantine``, f may be any.

    """
    known = defaultdict(list)
    with reference.open(newline="") as file:
        reader = csv.DictReader(file)
        has_rules_f = "num_byzantine" in (reader.fieldnames or ())
        for row in reader:
            last = [name for name, value in row.items() if name.startswith("accuracy_epoch_") and value][-1]
            known[_cell(row, has_rules_f)].append(float(row[last]))
    ours = defaultdict(list)
    for result in results:
        ours[_cell(_row(result), has_rules_f)].append(result["accuracies"][-1])
    return [Comparison(cell, tuple(ours[cell]), mean(known[cell])) for cell in ours if cell in known]


def report(comparisons: Sequence[Comparison]) -> str:
    """Return a Markdown table of the comparisons, and their summary."""
    lines = ["| attack | method | rule | ours | std | reference | difference | agrees |", "|---" * 8 + "|"]
    for entry in comparisons:
        attack, method, rule = entry.cell[:3]
        numbers = f"{mean(entry.ours):.4f} | {entry.deviation:.4f} | {entry.reference:.4f} | {entry.difference:+.4f}"
        lines.append(f"| {attack} | {method} | {rule} | {numbers} | {'yes' if entry.agrees else 'NO'} |")
    agreeing = sum(entry.agrees for entry in comparisons)
    bounds = f"within {_TOLERANCE} or {_DEVIATIONS} standard deviations"
    return "\n".join([*lines, "", f"{agreeing} of {len(comparisons)} cells agree with the reference {bounds}."])


def _row(result: Mapping[str, Any]) -> dict[str, Any]:
    return {
        "attack": result["attack"],
        "estimator": result["method"],
        "rule": result["rule"],
        "workers": result["num_workers"],
        "byzantine": num_attackers(result),
        "num_byzantine": result["assumed_byzantine"],
        "partition": result["partition"],
        "batch_per_worker": result["run"]["data"]["init_args"]["batch_size"],
        "lr": result["learning_rate"],
        "seed": result["seed"],
        **{f"accuracy_epoch_{epoch}": value for epoch, value in enumerate(result["accuracies"], start=1)},
        "seconds": round(result["seconds"], 1),
    }


def _cell(row: Mapping[str, Any], has_rules_f: bool) -> tuple[Any, ...]:
    """Return what a row has in common with those of other seeds."""
    names = [_without_parameters(row[column]) for column in ("attack", "estimator", "rule")]
    numbers = [int(row[column]) for column in ("workers", "byzantine", "batch_per_worker")]
    rules_f = int(row["num_byzantine"]) if has_rules_f else None
    return (*names, *numbers, float(row["lr"]), row.get("partition", "IID"), rules_f)


def _without_parameters(name: str) -> str:
    # "CTMA(GeometricMedian(3 iterations, smoothing 0.1))" -> "CTMA(GeometricMedian)", "momentum 0.9" -> "momentum"
    return re.sub(r"\([^()]*\d[^()]*\)|\s+[\d.]+$", "", name)
