"""Pictures of a grid's results."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import mean
from textwrap import wrap
from typing import Any

import matplotlib

matplotlib.use("Agg")

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.figure import Figure

from reproduction.results import final_accuracies

Result = Mapping[str, Any]

_WORST = "worst case"


def draw(results: Sequence[Result], folder: Path) -> list[Path]:
    """Draw both pictures for each setting, and return their paths."""
    paths = []
    for workers, byzantine in _values(results, "num_workers", "num_byzantine"):
        of_setting = [
            result for result in results if (result["num_workers"], result["num_byzantine"]) == (workers, byzantine)
        ]
        seeds = ", ".join(str(seed) for (seed,) in _values(results, "seed"))
        title = f"{byzantine} of {workers} workers Byzantine, seeds {seeds}"
        for name, picture in (("curves", curves), ("heatmap", heat_map)):
            figure = picture(of_setting)
            figure.suptitle(title, fontsize=13)
            paths.append(folder / f"{name}-{workers}-{byzantine}.png")
            save(figure, paths[-1])
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
    size = (1.1 * (len(attacks) + 1) * len(columns) + 3.5, 0.55 * len(rules) + 2)
    figure, panels = plt.subplots(1, len(columns), figsize=size, squeeze=False, sharey=True, layout="constrained")
    for column, panel in zip(columns, panels[0], strict=True):
        table = np.array([[mean(final[*column, rule, attack]) for (attack,) in attacks] for (rule,) in rules])
        table = np.column_stack([table, table.min(axis=1)])
        panel.imshow(table, vmin=0, vmax=1, cmap="RdYlGn", aspect="auto")
        panel.set_title(_column_title(columns, column), fontsize=11)
        names = [*(attack for (attack,) in attacks), _WORST]
        panel.set_xticks(range(len(names)), names, rotation=30, ha="right")
        panel.set_yticks(range(len(rules)), [_wrapped(rule) for (rule,) in rules], fontsize=8)
        panel.axvline(len(attacks) - 0.5, color="black", linewidth=2)
        best = table[:, -1].argmax()
        for (row, place), accuracy in np.ndenumerate(table):
            weight = "bold" if row == best and place == len(attacks) else "normal"
            panel.text(place, row, f"{accuracy:.3f}", ha="center", va="center", fontsize=8, weight=weight)
    return figure


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
