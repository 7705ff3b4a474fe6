"""What every rule costs, in reads of the matrix.

One read is the time of ``vectors.norm(dim=1)`` in the same run; in less than two of them, no rule can see all values
and then write a combination. Each row of the table also compares with a straightforward version in torch. Times are
medians of turns in which the read, every rule and every straightforward version follow one after the other.
Rules with a coordinate-wise part are measured with `compile=True` as well, after they were compiled.

`--check` compares every result with the straightforward version in float64 instead.
"""

import argparse
import copy
import math
from collections.abc import Callable
from itertools import product
from pathlib import Path

import torch
from harness import Table, by_turns
from torch import Tensor

from lightning_byzantine.aggregators import (
    CAF,
    CTMA,
    NNM,
    Aggregator,
    CoordinateWiseMedian,
    CoordinateWiseTrimmedMean,
    GeometricMedian,
    Krum,
    Mean,
    MultiKrum,
    PersistentFilter,
)

Rule = Callable[[Tensor, int], Tensor]


def plain_trimmed_mean(vectors: Tensor, f: int) -> Tensor:
    return vectors.sort(dim=0).values[f : len(vectors) - f].mean(0)


def plain_geometric_median(vectors: Tensor, f: int) -> Tensor:
    """Converged as far as float32 goes, with passes over the columns in every iteration."""
    point = vectors.mean(0)
    for _ in range(100):
        weights = 1 / (vectors - point).norm(dim=1).clamp(min=1e-12)
        previous, point = point, (weights / weights.sum()) @ vectors
        if (point - previous).norm() <= 1e-5 * (vectors - point).norm(dim=1).median():
            break
    return point


def plain_krum_order(vectors: Tensor, f: int) -> Tensor:
    squared = torch.cdist(vectors, vectors).square()
    return squared.sort(dim=1).values[:, 1 : len(vectors) - f].sum(1).argsort()


def plain_ctma(base: Rule) -> Rule:
    """In the manner of a loop over the workers."""

    def rule(vectors: Tensor, f: int) -> Tensor:
        center = base(vectors, f)
        distances = torch.stack([(vector - center).norm() for vector in vectors])
        return vectors[distances.argsort()[: len(vectors) - f]].mean(0)

    return rule


def plain_nnm(base: Rule) -> Rule:
    def rule(vectors: Tensor, f: int) -> Tensor:
        order = torch.cdist(vectors, vectors).argsort(dim=1)[:, : len(vectors) - f]
        return base(torch.stack([vectors[row].mean(0) for row in order]), f)

    return rule


def plain_median(vectors: Tensor, f: int) -> Tensor:
    return vectors.median(0).values


# Those without a straightforward version are compared with one in the tests.
RULES: dict[str, tuple[Aggregator, Rule | None]] = {
    "PersistentFilter": (PersistentFilter(), None),
    "Mean": (Mean(), lambda vectors, f: vectors.mean(0)),
    "CoordinateWiseMedian": (CoordinateWiseMedian(), plain_median),
    "CoordinateWiseTrimmedMean": (CoordinateWiseTrimmedMean(), plain_trimmed_mean),
    "GeometricMedian": (GeometricMedian(), plain_geometric_median),
    "Krum": (Krum(), lambda vectors, f: vectors[plain_krum_order(vectors, f)[0]]),
    "MultiKrum": (MultiKrum(), lambda vectors, f: vectors[plain_krum_order(vectors, f)[: len(vectors) - f]].mean(0)),
    "CAF": (CAF(), None),
    "CTMA(GeometricMedian)": (CTMA(GeometricMedian()), plain_ctma(plain_geometric_median)),
    "CTMA(NNM(GeometricMedian))": (CTMA(NNM(GeometricMedian())), plain_ctma(plain_nnm(plain_geometric_median))),
    "CTMA(CoordinateWiseMedian)": (CTMA(CoordinateWiseMedian()), plain_ctma(plain_median)),
    "CTMA(NNM(CoordinateWiseMedian))": (CTMA(NNM(CoordinateWiseMedian())), plain_ctma(plain_nnm(plain_median))),
}


COMPILED: dict[str, Aggregator] = {
    "CoordinateWiseMedian": CoordinateWiseMedian(compile=True),
    "CoordinateWiseTrimmedMean": CoordinateWiseTrimmedMean(compile=True),
    "CTMA(CoordinateWiseMedian)": CTMA(CoordinateWiseMedian(compile=True)),
    "CTMA(NNM(CoordinateWiseMedian))": CTMA(NNM(CoordinateWiseMedian(compile=True))),
}


def measure(
    num_workers: int, dimension: int, names: list[str], turns: int, plain: bool
) -> dict[tuple[str, str], float]:
    """Return seconds of the read and, by name, of each rule as it is, compiled, and written straightforwardly."""
    vectors = torch.randn(num_workers, dimension, generator=torch.Generator().manual_seed(0))
    f = (num_workers - 1) // 2
    contenders: dict[tuple[str, str], Callable[[], object]] = {("read", ""): lambda: vectors.norm(dim=1)}
    for name in names:
        rule, straightforward = RULES[name]
        # A copy, since a rule may remember how many workers there were.
        fresh = copy.deepcopy(rule)
        contenders[name, "rule"] = lambda rule=fresh: rule(vectors, f)
        if name in COMPILED:
            contenders[name, "compiled"] = lambda rule=COMPILED[name]: rule(vectors, f)
        if plain and straightforward is not None:
            contenders[name, "straightforward"] = lambda rule=straightforward: rule(vectors, f)
    return by_turns(contenders, turns, warm_up=1)  # the one before has left the caches and the allocator as it likes


def worst_error(num_workers: int, dimension: int, name: str) -> float:
    """Return the largest error of the rule, compiled or not, in parts of the median norm of the rows."""
    vectors = torch.randn(num_workers, dimension, generator=torch.Generator().manual_seed(0))
    f = (num_workers - 1) // 2
    # Byzantine rows that are nearer to one another than the others, for no choice to be a matter of luck.
    vectors[:f] = vectors[:f] * 0.5 + 0.5
    rule, straightforward = RULES[name]
    assert straightforward is not None
    expected = straightforward(vectors.double(), f)
    scale = vectors.norm(dim=1).median()
    rules = [rule, COMPILED[name]] if name in COMPILED else [rule]
    return max(float((rule(vectors, f) - expected).norm() / scale) for rule in rules)


def exponent(sizes: list[int], seconds: list[float]) -> float:
    """Return the slope of the line through the points in logarithms, by least squares."""
    x, y = torch.tensor(sizes).double().log(), torch.tensor(seconds).double().log()
    return float(((x - x.mean()) * (y - y.mean())).sum() / (x - x.mean()).square().sum())


def add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--workers", nargs="+", type=int, default=[5, 9, 17, 33, 65])
    parser.add_argument("--dimensions", nargs="+", type=int, default=[100_000, 1_000_000, 10_000_000])
    parser.add_argument("--rules", nargs="+", choices=RULES, default=list(RULES))
    parser.add_argument("--turns", type=int, default=5)
    parser.add_argument("--no-plain", action="store_true", help="leave the straightforward versions out")
    parser.add_argument("--check", action="store_true", help="compare results instead of times")
    parser.add_argument("--csv", type=Path)


def run(arguments: argparse.Namespace) -> None:
    if arguments.check:
        check(arguments)
        return
    columns = {"rule": "`{}`", "workers": "{}", "dimension": "{}", "reads": "{:.1f}", "compiled": "{:.1f}"}
    table = Table(columns | {"straightforward": "{:.1f}", "one read, ms": "{:.2f}"}, arguments.csv)
    seconds: dict[tuple[str, int, int], float] = {}
    for dimension, num_workers in product(arguments.dimensions, arguments.workers):
        measured = measure(num_workers, dimension, arguments.rules, arguments.turns, not arguments.no_plain)
        read = measured["read", ""]
        for name in arguments.rules:
            kinds = (measured.get((name, kind), math.nan) for kind in ("rule", "compiled", "straightforward"))
            table.add(name, num_workers, dimension, *(taken / read for taken in kinds), 1e3 * read)
            seconds[name, num_workers, dimension] = measured[name, "rule"]
    if len(arguments.dimensions) > 1 and len(arguments.workers) > 1:
        print()
        growth = Table({"rule": "`{}`", "exponent in the dimension": "{:.2f}", "in the number of workers": "{:.2f}"})
        largest, most = max(arguments.dimensions), max(arguments.workers)
        for name in arguments.rules:
            in_d = exponent(arguments.dimensions, [seconds[name, most, d] for d in arguments.dimensions])
            in_m = exponent(arguments.workers, [seconds[name, m, largest] for m in arguments.workers])
            growth.add(name, in_d, in_m)


def check(arguments: argparse.Namespace) -> None:
    table = Table({"rule": "`{}`", "workers": "{}", "dimension": "{}", "error": "{:.1e}"}, arguments.csv)
    names = [name for name in arguments.rules if RULES[name][1] is not None]
    for dimension, num_workers, name in product(arguments.dimensions, arguments.workers, names):
        table.add(name, num_workers, dimension, worst_error(num_workers, dimension, name))
