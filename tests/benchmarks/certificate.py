"""How tight ``Report.certificate`` is, and whether it holds.

Honest rows are Gaussian noise about a common mean of half its length: of equal rows, of rows whose lengths differ
(``exp`` of a standard normal over 2.5), and of rows with means of their own that are as long as the noise. All attacks
on vectors, and none, with 5, 9 and 17 workers, 2, 2 and 8 of them Byzantine, 20 and 1000 columns in two parameters;
each is drawn several times, for three steps.

- ``held``: the fraction of all steps in which the aggregate was no farther from the mean of the honest rows than the
  certificate says
- ``median ratio``, ``90%``: of the certificate to that distance, over all attacks
- ``liars known``: median of the same if the liars are known
- ``in spreads``: median of the certificate, in root mean square distances of honest rows from their mean, without
  attack and over all attacks
"""

import argparse
import copy
import math
from collections.abc import Callable, Iterator
from itertools import product
from pathlib import Path
from statistics import fmean, median, quantiles

import torch
from harness import Table
from torch import Tensor

from lightning_byzantine import attacks
from lightning_byzantine.aggregators import CAF, CTMA, NNM, Aggregator, GeometricMedian, PerLayer, PersistentFilter
from lightning_byzantine.attacks import Attack
from lightning_byzantine.matrix import Segments, WorkerMatrix

RULES: dict[str, Callable[[], Aggregator]] = {
    "PersistentFilter": PersistentFilter,
    "CTMA(NNM(GeometricMedian))": lambda: CTMA(NNM(GeometricMedian())),
    "NNM(GeometricMedian)": lambda: NNM(GeometricMedian()),
    "CAF": CAF,
    "GeometricMedian": GeometricMedian,
    "PerLayer(CAF)": lambda: PerLayer(CAF()),
}
ATTACKS: list[Attack | None] = [
    None,
    attacks.ALittleIsEnough(),
    attacks.ALittleIsEnough(z=-1.5),
    attacks.Alternating(),
    attacks.BitFlip(bit=52),
    attacks.Fang(),
    attacks.Framing(attacks.SignFlip(), start=2),
    attacks.GaussianNoise(std=3.0),
    attacks.HonestRadius(),
    attacks.InnerProductManipulation(),
    attacks.InnerProductManipulation(epsilon=2.0),
    attacks.Mimic(0),
    attacks.MinMax(),
    attacks.MinSum(),
    attacks.NonFinite(),
    attacks.OneLayer(),
    attacks.OptimalALittleIsEnough(),
    attacks.OptimalInnerProductManipulation(),
    attacks.RelocatedOrthogonalPerturbation(),
    attacks.Scale(10.0),
    attacks.SignFlip(),
    attacks.StaleGradient(1),
    attacks.Zero(),
]
KINDS = ["equal", "sizes", "means"]
WORKERS, COLUMNS, NUM_STEPS, ROUNDING = [(5, 2), (9, 2), (17, 8)], [20, 1000], 3, 1e-6


def honest(kind: str, m: int, d: int, generator: torch.Generator) -> Iterator[Tensor]:
    """Yield the rows of each step, if all are honest."""
    common, sizes, means = (torch.randn(*shape, generator=generator) for shape in [(d,), (m, 1), (m, d)])
    while True:
        noise = torch.randn(m, d, generator=generator)
        noise *= (sizes / 2.5).exp() if kind == "sizes" else 1
        yield (noise + common / 2 + (means if kind == "means" else 0)).double()


def draw(
    rule: Aggregator, attack: Attack | None, kind: str, m: int, f: int, d: int, generator: torch.Generator
) -> Iterator[tuple[float, float, float, float]]:
    """Yield in each step the certificate, the same if liars are known, the true distance, and the honest spread."""
    liars = [] if attack is None else (1 + torch.randperm(m - 1, generator=generator)[:f]).tolist()
    others = [worker for worker in range(m) if worker not in liars]
    segments = Segments.of_sizes([d]) if d < 200 else Segments.of_sizes([d - 200, 200])
    if attack is not None:
        attack = copy.deepcopy(attack)
        attack.bind(rule, f)
    for _, rows in zip(range(NUM_STEPS), honest(kind, m, d, generator), strict=False):
        matrix = WorkerMatrix([rows], segments=segments)
        decision = rule.decide(matrix if attack is None else attack.tamper(matrix, liars), f)
        report, mean = decision.report(), rows[others].mean(0)
        bounds = report.certificate(), report.certificate(liars)
        if bounds[0] is None or bounds[1] is None:
            continue
        error, spread = (mean - decision.values()[0]).norm(), (rows[others] - mean).square().sum(1).mean().sqrt()
        yield bounds[0], bounds[1], float(error), float(spread)


def add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--rules", nargs="+", choices=list(RULES), default=list(RULES))
    parser.add_argument("--draws", type=int, default=2, help="of each attack, kind of rows, and size")
    parser.add_argument("--csv", type=Path)


def run(arguments: argparse.Namespace) -> None:
    names = ["rule", "rows", "steps", "held", "median ratio", "90%", "liars known", "in spreads"]
    forms = ["{}", "{}", "{}", "{:.2%}", "{:.2f}", "{:.1f}", "{:.2f}", "{}"]
    table = Table(dict(zip(names, forms, strict=True)), arguments.csv)
    for name, kind in product(arguments.rules, KINDS):
        generator, steps, clean = torch.Generator().manual_seed(0), [], []
        cases = product(WORKERS, COLUMNS, ATTACKS, range(arguments.draws))
        for (m, f), d, attack, _ in cases:
            drawn = list(draw(RULES[name](), attack, kind, m, f, d, generator))
            steps += drawn
            clean += drawn if attack is None else []
        held = fmean(error <= bound * (1 + ROUNDING) + ROUNDING * spread for bound, _, error, spread in steps)
        ratios = [(bound / error, known / error) for bound, known, error, spread in steps if error > 0.01 * spread]
        shown = (f"{median(bound / spread for bound, _, _, spread in part):.2f}" for part in (clean, steps))
        ninth = quantiles([ratio for ratio, _ in ratios], n=10)[-1] if len(ratios) > 1 else math.nan
        known = median(ratio for _, ratio in ratios)
        table.add(name, kind, len(steps), held, median(r for r, _ in ratios), ninth, known, ", ".join(shown))
