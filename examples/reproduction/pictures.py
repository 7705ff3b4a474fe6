"""Pictures of a grid's results."""

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import mean
from textwrap import wrap
from typing import Any

import matplotlib

matplotlib.use("Agg")

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from reproduction.grid import scenario
from reproduction.ranking import Entry, ranking
from reproduction.results import final_accuracies

Result = Mapping[str, Any]

_WORST = "worst case"
# Attacks up to which the heat maps of two methods stand side by side.
_MOST_BESIDE = 8


def draw(results: Sequence[Result], folder: Path) -> list[Path]:
    """Draw both pictures for each scenario, and that of the ranking, and return their paths."""
    paths = []

    def write(figure: Figure, name: str, title: str) -> None:
        seeds = ", ".join(str(seed) for (seed,) in _values(results, "seed"))
        figure.suptitle(f"{title}, seeds {seeds}", fontsize=13)
        paths.append(folder / f"{re.sub(r'[^a-z0-9.]+', '-', name.lower()).strip('-')}.png")
        save(figure, paths[-1])

    for name in dict.fromkeys(map(scenario, results)):
        of_scenario = [result for result in results if scenario(result) == name]
        write(curves(of_scenario), f"curves {name}", f"Byzantine workers: {name}")
        write(heat_map(of_scenario), f"heatmap {name}", f"Byzantine workers: {name}")
    write(ranking_map(ranking(results)), "ranking", "Worst of all attacks")
    return paths


def curves(results: Sequence[Result]) -> Figure:
    """Draw accuracy against epoch, a line for each rule: a row of panels for each attack, a column for each method."""
    attacks, columns, rules = _values(results, "attack"), _columns(results), _values(results, "rule")
    size = (4.5 * len(columns) + 4, 2.8 * len(attacks) + 1)
    figure, panels = plt.subplots(
        len(attacks), len(columns), figsize=size, squeeze=False, sharex=True, sharey=True, layout="constrained"
    )
    for (attack,), row in zip(attacks, panels, strict=True):
        for column, panel in zip(columns, row, strict=True):
            panel.set_title(f"{attack}: {_column_title(columns, column)}", fontsize=10)
            panel.grid(alpha=0.3)
            for index, (rule,) in enumerate(rules):
                runs = _accuracies(results, attack=attack, rule=rule, method=column[0], learning_rate=column[1])
                curve = np.mean(runs, axis=0)
                style = {"color": f"C{index % 10}", "linestyle": ("-", "--", ":")[index // 10 % 3]}
                panel.plot(range(1, len(curve) + 1), curve, marker=".", label=rule, **style)
        row[0].set_ylabel("test accuracy")
    for panel in panels[-1]:
        panel.set_xlabel("epoch")
        panel.xaxis.get_major_locator().set_params(integer=True)
    handles, labels = panels[0, 0].get_legend_handles_labels()
    figure.legend(handles, [_wrapped(label) for label in labels], loc="outside right center", fontsize=8)
    return figure


def heat_map(results: Sequence[Result]) -> Figure:
    """Draw the final accuracy of each rule under each attack, and its worst: one panel for each method."""
    attacks, columns, rules = _values(results, "attack"), _columns(results), _values(results, "rule")
    final = final_accuracies(results, "method", "learning_rate", "rule", "attack")
    beside, below = (len(columns), 1) if len(attacks) <= _MOST_BESIDE else (1, len(columns))
    size = (1.1 * (len(attacks) + 1) * beside + 3.5, (0.55 * len(rules) + 2) * below)
    figure, panels = plt.subplots(below, beside, figsize=size, squeeze=False, sharey=True, layout="constrained")
    for column, panel in zip(columns, panels.flat, strict=True):
        table = np.array([[mean(final[*column, rule, attack]) for (attack,) in attacks] for (rule,) in rules])
        table = np.column_stack([table, table.min(axis=1)])
        names = [*(attack for (attack,) in attacks), _WORST]
        _show(table, panel, names, [rule for (rule,) in rules], num_summaries=1)
        panel.set_title(_column_title(columns, column), fontsize=11)
    return figure


def ranking_map(entries: Sequence[Entry]) -> Figure:
    """Draw the worst case of each rule in each scenario and in all: one panel for each method."""
    columns = list(dict.fromkeys(entry.name[1:] for entry in entries))
    names = entries[0].scenarios
    rows = [[entry for entry in entries if entry.name[1:] == column] for column in columns]
    size = (len(columns) * (1.1 * (len(names) + 2) + 3), 0.55 * max(map(len, rows)) + 2.5)
    figure, panels = plt.subplots(1, len(columns), figsize=size, squeeze=False, layout="constrained")
    for column, ranked, panel in zip(columns, rows, panels[0], strict=True):
        of_entry = [[*map(entry.worst_in, names), entry.five_worst, entry.worst] for entry in ranked]
        labels = [*names, "mean of five worst", _WORST]
        _show(np.array(of_entry), panel, labels, [entry.name[0] for entry in ranked], num_summaries=2)
        panel.set_title(_column_title(columns, column), fontsize=11)
    return figure


def _show(table: np.ndarray, panel: Axes, columns: list[str], rows: list[str], num_summaries: int) -> None:
    """Draw a table of accuracies: its last columns are summaries, and the best of each of these is bold."""
    panel.imshow(table, vmin=0, vmax=1, cmap="RdYlGn", aspect="auto")
    panel.set_xticks(range(len(columns)), columns, rotation=30, ha="right")
    panel.set_yticks(range(len(rows)), [_wrapped(row) for row in rows], fontsize=8)
    first_summary = len(columns) - num_summaries
    panel.axvline(first_summary - 0.5, color="black", linewidth=2)
    best = table.argmax(axis=0)
    for (row, place), accuracy in np.ndenumerate(table):
        weight = "bold" if row == best[place] and place >= first_summary else "normal"
        panel.text(place, row, f"{accuracy:.3f}", ha="center", va="center", fontsize=8, weight=weight)


def save(figure: Figure, path: Path) -> None:
    """Write a picture, atomically."""
    unfinished = path.with_name(f".{path.name}")
    figure.savefig(unfinished, dpi=120)
    plt.close(figure)
    unfinished.replace(path)


def _values(results: Sequence[Result], *axes: str) -> list[tuple[Any, ...]]:
    """Return the distinct values on these axes, in the order of the grid."""
    return list(dict.fromkeys(tuple(result[axis] for axis in axes) for result in results))


def _columns(results: Sequence[Result]) -> list[tuple[Any, ...]]:
    return _values(results, "method", "learning_rate")


def _column_title(columns: Sequence[tuple[Any, ...]], column: tuple[Any, ...]) -> str:
    method, rate = column
    return str(method) if len({rate for _, rate in columns}) == 1 else f"{method}, learning rate {rate:g}"


def _accuracies(results: Sequence[Result], **place: Any) -> list[list[float]]:
    return [result["accuracies"] for result in results if place.items() <= result.items()]


def _wrapped(name: str) -> str:
    return "\n".join(wrap(name, 34))
