"""What CTMA adds to a rule: an error that goes to 0 with the fraction of Byzantine workers, unlike the base rule's.

``python examples/optimal_order.py`` needs no training. Honest rows are skewed, so that their mean is not their median
and a base rule has an error even without an attack. The picture shows ||x^ - mean of the honest||^2, divided by the
honest rows' variance, against delta = f / m, for the worst attack, averaged over draws, in which the same workers
attack: the default rule remembers them. p is fitted to error ~ delta^p.
"""

import argparse
import csv
from copy import deepcopy
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import torch
from matplotlib.figure import Figure
from reproduction.pictures import save
from torch import Tensor

from lightning_byzantine.aggregators import (
    CTMA,
    Aggregator,
    CoordinateWiseMedian,
    CoordinateWiseTrimmedMean,
    GeometricMedian,
    Krum,
    MultiKrum,
    PersistentFilter,
)
from lightning_byzantine.attacks import ALittleIsEnough, GaussianNoise, InnerProductManipulation, SignFlip, VectorAttack

BASES: dict[str, Aggregator] = {
    "CoordinateWiseMedian": CoordinateWiseMedian(),
    "CoordinateWiseTrimmedMean": CoordinateWiseTrimmedMean(),
    "GeometricMedian": GeometricMedian(),
    "Krum": Krum(),
    "MultiKrum": MultiKrum(),
}
RULES = BASES | {f"CTMA({name})": CTMA(base) for name, base in BASES.items()} | {"PersistentFilter": PersistentFilter()}
# On both sides of the honest rows, near and far: the worst one depends on the rule and on delta.
ATTACKS: list[VectorAttack] = [
    SignFlip(),
    *(InnerProductManipulation(epsilon) for epsilon in (0.1, 0.5, 2.0)),
    *(ALittleIsEnough(z) for z in (0.25, 0.5, 1.0, 2.0, -0.5, -1.0, -2.0)),
    GaussianNoise(std=100.0),
]
# The largest delta to fit the exponent to.
_FITTED = 0.1

Errors = dict[str, dict[float, float]]


def main(arguments: list[str] | None = None) -> None:
    """Measure, print and draw."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workers", type=int, default=100, help="m")
    parser.add_argument("--dimensions", type=int, default=32, help="coordinates of a row")
    parser.add_argument("--draws", type=int, default=10, help="draws of the honest rows to average over")
    parser.add_argument("--out", type=Path, default=Path("runs/optimal_order"), help="output folder")
    options = parser.parse_args(arguments)
    options.out.mkdir(parents=True, exist_ok=True)
    errors = worst_errors(options.workers, options.dimensions, options.draws)
    with (options.out / "errors.csv").open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["rule", "delta", "error"])
        writer.writerows((rule, delta, error) for rule, curve in errors.items() for delta, error in curve.items())
    save(draw_errors(errors), options.out / "optimal_order.png")
    shown = [0.0, *(min(errors["Krum"], key=lambda delta: abs(delta - wanted)) for wanted in (0.01, 0.1, 0.47))]
    print("| rule | " + " | ".join(f"delta {delta:.2f}" for delta in shown) + " | exponent |\n" + "|---" * 6 + "|")
    for rule, curve in errors.items():
        print(f"| {rule} | " + " | ".join(f"{curve[delta]:.2e}" for delta in shown) + f" | {exponent(curve):.2f} |")
    print(f"wrote {options.out / 'errors.csv'}\nwrote {options.out / 'optimal_order.png'}")


def worst_errors(num_workers: int, num_dimensions: int, num_draws: int) -> Errors:
    """Return for each rule and delta the mean error under the attack that makes it largest."""
    numbers = np.unique(np.round(num_workers * np.array([0, *np.geomspace(1 / num_workers, 0.47, 12)])).astype(int))
    errors: Errors = {name: {} for name in RULES}
    for num_byzantine in (int(number) for number in numbers):
        totals = {name: np.zeros(len(ATTACKS)) for name in RULES}
        for column, attack in enumerate(ATTACKS):
            rules = deepcopy(RULES)
            for draw in range(num_draws):
                vectors = skewed_rows(num_workers, num_dimensions, torch.Generator().manual_seed(draw))
                honest = vectors[: num_workers - num_byzantine]
                center, variance = honest.mean(dim=0), honest.var(dim=0, correction=0).sum()
                sent = attack(vectors, range(len(honest), num_workers)) if num_byzantine > 0 else vectors
                for name, rule in rules.items():
                    result = rule(sent, num_byzantine=num_byzantine)
                    totals[name][column] += float((result - center).square().sum() / variance)
        for name, total in totals.items():
            errors[name][num_byzantine / num_workers] = float(total.max()) / num_draws
    return errors


def skewed_rows(num_workers: int, num_dimensions: int, generator: torch.Generator) -> Tensor:
    """Return rows of exponentially distributed coordinates, plus one such number for the whole row.

    Args:
        num_workers: m.
        num_dimensions: d.
        generator: random number generator.

    Returns:
        [m, d], float64, with mean 2.

    """
    own = torch.rand(num_workers, num_dimensions, generator=generator, dtype=torch.float64)
    shared = torch.rand(num_workers, 1, generator=generator, dtype=torch.float64)
    return -torch.log1p(-own) - torch.log1p(-shared)


def exponent(curve: dict[float, float]) -> float:
    """Return p of error ~ delta^p, fitted where 0 < delta <= 0.1."""
    points = [(np.log(delta), np.log(error)) for delta, error in curve.items() if 0 < delta <= _FITTED]
    return float(np.polyfit(*np.transpose(points), deg=1)[0])


def draw_errors(errors: Errors) -> Figure:
    """Draw small deltas on linear axes, where CTMA's errors begin at 0, and all on logarithmic ones."""
    figure, (near, every) = plt.subplots(1, 2, figsize=(16, 5), layout="constrained")
    for index, (rule, curve) in enumerate(errors.items()):
        style = {"color": f"C{index % len(BASES)}", "linestyle": "-" if rule.startswith("CTMA") else "--"}
        if rule == "PersistentFilter":
            style = {"color": "black", "linestyle": "-"}
        for panel, deltas in (
            (near, [delta for delta in curve if delta <= _FITTED]),
            (every, [delta for delta in curve if delta > 0]),
        ):
            label = f"{rule}: exponent {exponent(curve):.2f}"
            panel.plot(deltas, [curve[delta] for delta in deltas], marker="o", label=label, **style)
    for panel in (near, every):
        panel.set_xlabel("delta = f / m")
        panel.grid(alpha=0.3)
    near.set_ylabel("squared error / honest variance, worst attack")
    every.set(xscale="log", yscale="log")
    lines, labels = every.get_legend_handles_labels()
    figure.legend(lines, labels, title=f"exponents: 0 < delta <= {_FITTED:g}", loc="outside right center")
    return figure


if __name__ == "__main__":
    main()
