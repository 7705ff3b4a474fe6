"""Final accuracy against the learning rate, for each method, with and without an attack.

``python examples/tuning.py --config examples/configs/reproduce/tuning.yaml --data.path=mnist.npz``. A method's plateau
is the range of learning rates around the best one in which its accuracy stays within 2 points of the best.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import mean
from typing import Any

import matplotlib.pyplot as plt
from matplotlib.figure import Figure
from reproduction.command import announce, grid_parser, run_grid
from reproduction.pictures import save
from reproduction.results import final_accuracies

_PLATEAU = 0.02


def main(arguments: list[str] | None = None) -> None:
    """Run the grid, print the plateaus and draw them."""
    parser = grid_parser(__doc__, out="runs/tuning")
    options = parser.parse_args(arguments)
    results = run_grid(parser, options)
    picture = Path(options.out) / "tuning.png"
    save(draw_tuning(results), picture)
    print("| attack | method | best accuracy | plateau | width, factor |\n" + "|---" * 5 + "|")
    for (attack, method), curve in accuracy_curves(results).items():
        low, high = plateau(curve)
        print(f"| {attack} | {method} | {max(curve.values()):.3f} | {low:g} to {high:g} | {high / low:.3g} |")
    announce([Path(options.out) / "results.csv", picture])


def accuracy_curves(results: Sequence[Mapping[str, Any]]) -> dict[tuple[str, str], dict[float, float]]:
    """Return by attack and method the mean final accuracy at each learning rate, in ascending order."""
    curves: dict[tuple[str, str], dict[float, float]] = {}
    final = final_accuracies(results, "attack", "method", "learning_rate")
    for (attack, method, rate), accuracies in sorted(final.items(), key=lambda item: item[0][2]):
        curves.setdefault((attack, method), {})[rate] = mean(accuracies)
    return curves


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


def draw_tuning(results: Sequence[Mapping[str, Any]]) -> Figure:
    """Draw a panel for each attack, a line for each method, thick where its plateau is."""
    curves = accuracy_curves(results)
    attacks = list(dict.fromkeys(result["attack"] for result in results))
    methods = list(dict.fromkeys(result["method"] for result in results))
    figure, panels = plt.subplots(
        1, len(attacks), figsize=(6 * len(attacks), 4.5), squeeze=False, sharey=True, layout="constrained"
    )
    for attack, panel in zip(attacks, panels[0], strict=True):
        for color, method in enumerate(methods):
            curve = curves[attack, method]
            low, high = plateau(curve)
            panel.plot(curve.keys(), curve.values(), f"C{color}o-", label=f"{method}: {low:g} to {high:g}")
            on_plateau = {rate: accuracy for rate, accuracy in curve.items() if low <= rate <= high}
            panel.plot(on_plateau.keys(), on_plateau.values(), f"C{color}-", linewidth=5, alpha=0.4)
        panel.set(xscale="log", xlabel="learning rate", title=f"attack: {attack}")
        panel.grid(alpha=0.3)
        panel.legend(title=f"plateau: within {_PLATEAU:g} of the best", fontsize=8, title_fontsize=8)
    panels[0, 0].set_ylabel("final test accuracy")
    return figure


if __name__ == "__main__":
    main()
