"""Final accuracy against the learning rate, for each method, with and without attacks.

``python examples/tuning.py --configs examples/configs/reproduce/tuning.yaml --data.path=mnist.npz``. Options other than
these override all configs, as those of ``examples/reproduce.py`` do. A method's plateau is the range of learning rates
around the best one in which its accuracy stays within 2 points of the best.
"""

from argparse import ArgumentParser, RawDescriptionHelpFormatter
from collections.abc import Mapping, Sequence
from math import ceil
from pathlib import Path
from statistics import mean
from typing import Any

import matplotlib.pyplot as plt
from matplotlib.figure import Figure
from reproduction.command import announce, grid_parser, run_grid
from reproduction.pictures import save
from reproduction.results import final_accuracies

_PLATEAU = 0.02
_PANELS_BESIDE = 3

# By attack and rule, and then by method: accuracy at each learning rate, in ascending order.
Curves = dict[tuple[str, str], dict[str, dict[float, float]]]


def main(arguments: list[str] | None = None) -> None:
    """Run the grids, print the plateaus and draw them."""
    outer = ArgumentParser(description=__doc__, formatter_class=RawDescriptionHelpFormatter)
    outer.add_argument("--configs", nargs="+", type=Path, required=True, help="YAML of each grid")
    outer.add_argument("--out", type=Path, default=Path("runs/tuning"), help="output folder, with one for each grid")
    own, options = outer.parse_known_args(arguments)
    results = []
    for config in own.configs:
        folder = own.out / config.stem
        parser = grid_parser(__doc__, out=str(folder))
        results += run_grid(parser, parser.parse_args(["--config", str(config), *options]))
    curves = accuracy_curves(results)
    picture = own.out / "tuning.png"
    save(draw_tuning(curves), picture)
    print(plateau_table(curves))
    announce([*(own.out / config.stem / "results.csv" for config in own.configs), picture])


def accuracy_curves(results: Sequence[Mapping[str, Any]]) -> Curves:
    """Return the mean over the seeds of the final accuracies."""
    curves: Curves = {}
    final = final_accuracies(results, "attack", "rule", "method", "learning_rate")
    for (attack, rule, method, rate), accuracies in final.items():
        curves.setdefault((attack, rule), {}).setdefault(method, {})[rate] = mean(accuracies)
    return {
        case: {method: dict(sorted(curve.items())) for method, curve in of_case.items()}
        for case, of_case in curves.items()
    }


def plateau(curve: Mapping[float, float]) -> tuple[float, float]:
    """Return the least and the largest learning rate of the plateau around the best one.

    Example:
        >>> plateau({0.01: 0.95, 0.1: 0.5, 1.0: 0.96, 10.0: 0.945})
        (1.0, 10.0)

    """
    rates = sorted(curve)
    best = max(rates, key=lambda rate: curve[rate])
    enough = curve[best] - _PLATEAU
    low = high = rates.index(best)
    while low > 0 and curve[rates[low - 1]] >= enough:
        low -= 1
    while high < len(rates) - 1 and curve[rates[high + 1]] >= enough:
        high += 1
    return rates[low], rates[high]


def plateau_table(curves: Curves) -> str:
    """Return a Markdown table with a row for each curve."""
    lines = ["| attack | rule | method | best accuracy | plateau | width, factor |", "|---" * 6 + "|"]
    for (attack, rule), of_case in curves.items():
        for method, curve in of_case.items():
            low, high = plateau(curve)
            numbers = f"{max(curve.values()):.3f} | {low:g} to {high:g} | {high / low:.3g}"
            lines.append(f"| {attack} | `{rule}` | {method} | {numbers} |")
    return "\n".join(lines)


def draw_tuning(curves: Curves) -> Figure:
    """Draw a panel for each attack and rule, a line for each method, thick where its plateau is."""
    methods = list(dict.fromkeys(method for of_case in curves.values() for method in of_case))
    beside = min(_PANELS_BESIDE, len(curves))
    below = ceil(len(curves) / beside)
    figure, panels = plt.subplots(
        below, beside, figsize=(4.5 * beside + 1, 3.2 * below + 1), squeeze=False, sharey=True, layout="constrained"
    )
    for panel in panels.flat[len(curves) :]:
        panel.set_axis_off()
    for panel in panels.flat[max(0, len(curves) - beside) : len(curves)]:
        panel.set_xlabel("learning rate")
    for ((attack, rule), of_case), panel in zip(curves.items(), panels.flat, strict=False):
        for method, curve in of_case.items():
            color = plt.get_cmap("tab20")(methods.index(method) % 20)
            low, high = plateau(curve)
            on_plateau = {rate: accuracy for rate, accuracy in curve.items() if low <= rate <= high}
            panel.plot(curve.keys(), curve.values(), ".-", color=color, label=method)
            panel.plot(on_plateau.keys(), on_plateau.values(), color=color, linewidth=5, alpha=0.4)
        panel.set(xscale="log", title=f"attack: {attack}, {rule}")
        panel.title.set_fontsize(9)
        panel.grid(alpha=0.3)
    for row in panels:
        row[0].set_ylabel("final test accuracy")
    lines = {
        label: line for panel in panels.flat for line, label in zip(*panel.get_legend_handles_labels(), strict=True)
    }
    title = f"thick: the plateau, within {_PLATEAU:g} of the best"
    figure.legend(lines.values(), lines.keys(), title=title, loc="outside lower center", ncols=4, fontsize=9)
    return figure


if __name__ == "__main__":
    main()
