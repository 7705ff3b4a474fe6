"""Which rule is best: by its worst case, and by the mean of its five worst."""

import csv
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import mean
from typing import Any

from reproduction.grid import scenario
from reproduction.results import final_accuracies

_NUM_WORST = 5
_AXES = ("rule", "method", "learning_rate")


@dataclass(frozen=True)
class Entry:
    """A rule under an estimator and a learning rate.

    Attributes:
        name: the rule, the method, the learning rate.
        accuracies: final accuracy, mean over the seeds, by scenario and attack.

    """

    name: tuple[str, str, float]
    accuracies: Mapping[tuple[str, str], float]

    @property
    def worst(self) -> float:
        """The least accuracy."""
        return min(self.accuracies.values())

    @property
    def worst_case(self) -> tuple[str, str]:
        """Scenario and attack of the least accuracy."""
        return min(self.accuracies, key=lambda case: self.accuracies[case])

    @property
    def five_worst(self) -> float:
        """The mean of the five least accuracies."""
        return mean(sorted(self.accuracies.values())[:_NUM_WORST])

    def worst_in(self, name: str) -> float:
        """Return the least accuracy in one scenario."""
        return min(accuracy for (of_case, _), accuracy in self.accuracies.items() if of_case == name)

    @property
    def scenarios(self) -> list[str]:
        """All scenarios, in the grid's order."""
        return list(dict.fromkeys(name for name, _ in self.accuracies))


def ranking(results: Sequence[Mapping[str, Any]]) -> list[Entry]:
    """Return an entry for each rule, method and learning rate, the one with the best worst case first."""
    named = [{**result, "scenario": scenario(result)} for result in results]
    tables: dict[tuple[Any, ...], dict[tuple[str, str], float]] = {}
    for (*name, of_case, attack), accuracies in final_accuracies(named, *_AXES, "scenario", "attack").items():
        tables.setdefault(tuple(name), {})[of_case, attack] = mean(accuracies)
    entries = [Entry(name, accuracies) for name, accuracies in tables.items()]
    return sorted(entries, key=lambda entry: (entry.worst, entry.five_worst), reverse=True)


def ranking_table(entries: Sequence[Entry]) -> str:
    """Return a ranking as a Markdown table, with the best of each column in bold."""
    rows = [_numbers(entry) for entry in entries]
    best = {column: max(row[column] for row in rows) for column in rows[0]}
    several_rates = len({entry.name[2] for entry in entries}) > 1
    names = ["rule", "method", *["learning rate"] * several_rates]
    lines = ["| " + " | ".join(["", *names, "worst case", *rows[0]]) + " |"]
    lines.append("|---" * (2 + len(names) + len(rows[0])) + "|")
    for place, (entry, row) in enumerate(zip(entries, rows, strict=True), start=1):
        numbers = [f"**{value:.3f}**" if value == best[column] else f"{value:.3f}" for column, value in row.items()]
        shown = [f"`{entry.name[0]}`", *map(str, entry.name[1 : len(names)])]
        lines.append(f"| {' | '.join([str(place), *shown, ': '.join(entry.worst_case), *numbers])} |")
    return "\n".join(lines)


def write_ranking(entries: Sequence[Entry], path: Path) -> None:
    """Write a ranking as CSV, atomically."""
    unfinished = path.with_name(f".{path.name}")
    with unfinished.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow([*_AXES, "worst_case_scenario", "worst_case_attack", *_numbers(entries[0])])
        for entry in entries:
            numbers = [round(number, 4) for number in _numbers(entry).values()]
            writer.writerow([*entry.name, *entry.worst_case, *numbers])
    os.replace(unfinished, path)


def _numbers(entry: Entry) -> dict[str, float]:
    everywhere = {"worst": entry.worst, "mean of five worst": entry.five_worst}
    return everywhere | {f"worst, {name}": entry.worst_in(name) for name in entry.scenarios}
