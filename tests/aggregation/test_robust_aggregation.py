import numpy as np
import pytest
import torch
from oracles import krum, multi_krum
from torch import Tensor

from lightning_byzantine.aggregation.observers import Observers
from lightning_byzantine.aggregation.quarantine import Quarantine
from lightning_byzantine.aggregation.robust_aggregation import RobustAggregation
from lightning_byzantine.aggregators import (
    CTMA,
    Aggregator,
    CoordinateWiseMedian,
    GeometricMedian,
    Krum,
    Mean,
    MultiKrum,
    PerLayer,
    PersistentFilter,
)
from lightning_byzantine.estimators import WorkerMomentum
from lightning_byzantine.estimators.estimator import Scale
from lightning_byzantine.matrix import Segments, WorkerMatrix
from lightning_byzantine.matrix.sketch import PERIOD, fold, sketches_of

SIZES = [150, 350]


def rows(m: int = 7) -> Tensor:
    vectors = 0.5 + torch.randn(m, 500, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    vectors[0] *= 30
    return vectors


def scale_of(rule: Aggregator, vectors: Tensor, f: int, quarantined: tuple[int, ...] = ()) -> Scale | None:
    quarantine = Quarantine()
    if quarantined:
        quarantine.add(quarantined, rule, len(vectors), f)
    matrix = WorkerMatrix([vectors], segments=Segments.of_sizes(SIZES))
    return RobustAggregation(rule, f, quarantine, Observers()).aggregate(matrix).scale


def by_hand(vectors: Tensor, f: int, selected: list[int], result: np.ndarray) -> tuple[float, float]:
    """Return the median length; and the distance of the next row after the m - f nearest, by what an average keeps."""
    lengths = sorted(float(row.norm()) for row in vectors)
    length = lengths[(len(vectors) - 1) // 2]
    distances = sorted(np.linalg.norm(row - result) for row in vectors.numpy())
    # The mean over all columns of the sum of squared weights.
    kept = sum(size / (count * sum(SIZES)) for size, count in zip(SIZES, selected, strict=True)) ** 0.5
    return in_eight_bits(length), in_eight_bits(min(distances[len(vectors) - f], length) * kept)


def in_eight_bits(value: float) -> float:
    return float(torch.tensor(value).bfloat16())


@pytest.mark.parametrize("dropped", [[], [3]])
def test_the_rule_says_how_long_honest_vectors_are(dropped: list[int]) -> None:
    vectors = rows()
    seen, left = vectors[[i for i in range(7) if i not in dropped]], 2 - len(dropped)
    vectors[dropped] = torch.nan
    listed = list(seen.numpy())
    for rule, selected, result in (
        (Krum(), [1, 1], krum(listed, left)),
        (MultiKrum(), [5, 5], multi_krum(listed, left)),
        (
            PerLayer(MultiKrum()),
            [5, 5],
            np.concatenate([multi_krum(list(part.numpy()), left) for part in seen.split(SIZES, dim=1)]),
        ),
    ):
        scale = scale_of(rule, vectors, f=2)
        assert scale is not None
        assert (scale.length, scale.noise) == by_hand(seen, left, selected, result)


def test_liars_move_the_scale_no_farther_than_honest_rows_go() -> None:
    for value in (0.0, 1e6, -3.0):
        vectors = rows()
        honest = vectors[2:].norm(dim=1)
        vectors[:2] = value
        scale = scale_of(MultiKrum(), vectors, f=2)
        assert scale is not None
        assert scale.length <= in_eight_bits(honest.max())
        assert scale.noise <= in_eight_bits(honest.max())


@pytest.mark.parametrize(
    ("rule", "f"),
    [(Krum(), 0), (Mean(), 0), (CoordinateWiseMedian(), 2), (CTMA(CoordinateWiseMedian()), 2)],
    ids=["no Byzantine workers", "Mean", "no distances", "distances from another point"],
)
def test_where_nobody_lies_or_the_rule_knows_no_distances_there_is_no_scale(rule: Aggregator, f: int) -> None:
    assert scale_of(rule, rows(), f) is None


@pytest.mark.parametrize("rule", [Krum(), PersistentFilter()], ids=repr)
def test_the_step_back_from_what_liars_did_is_limited_as_well(rule: Aggregator) -> None:
    assert scale_of(rule, rows(), 2, quarantined=(0,)) is not None
    assert scale_of(rule, rows(), 2, quarantined=(0, 3)) is not None
    dropped = rows()
    dropped[[0, 3]] = torch.nan
    assert scale_of(rule, dropped, 2) is not None


@pytest.mark.parametrize("left_out", ["nobody", "not finite", "quarantine"])
def test_sketches_are_those_of_the_workers(left_out: str) -> None:
    vectors, start = rows()[:, :200], torch.ones(200, dtype=torch.float64)
    quarantine, seen = Quarantine(), [0, 1, 2, 3, 4, 5, 6]
    if left_out != "nobody":
        seen.remove(2)
    if left_out == "quarantine":
        quarantine.add([2], CoordinateWiseMedian(), 7, 2)
    if left_out == "not finite":
        vectors[2] = torch.inf
    robust = RobustAggregation(Krum(), 2, quarantine, Observers())
    aggregated = robust.aggregate(WorkerMatrix([vectors]), since=[start])
    assert aggregated.scale is not None
    step = aggregated.scale.step
    assert step is not None
    way = aggregated.parts[0] - start
    torch.testing.assert_close(step.lengths, torch.stack([start.norm(), way.norm()]))
    assert step.sketches.isnan().any(dim=1).tolist() == [worker not in seen for worker in range(7)] + [False] * 2
    known, sketches = torch.stack([*vectors[seen], start, way]), step.sketches[[*seen, -2, -1]]
    # Of so few columns, sketches have the inner products exactly.
    torch.testing.assert_close(sketches @ sketches.T, known @ known.T)


def signs_of_sketches(num_columns: int) -> Tensor:
    """Return the sign of each column in the sum of all numbers of a sketch."""
    folded = [torch.zeros(1, PERIOD) for _ in range(0, num_columns, PERIOD)]
    for index, out in enumerate(folded):
        fold(torch.ones(1, PERIOD), index * PERIOD, out)
    return (torch.cat(folded) * sketches_of(torch.eye(PERIOD)).sum(1)).flatten()[:num_columns]


def lengths_received(attack: Tensor | None, num_steps: int = 30) -> Tensor:
    """Return how long what the optimizer receives is, if 2 of 5 workers change sides in every step along a vector."""
    generator, size = torch.Generator().manual_seed(0), 200_000
    robust = RobustAggregation(GeometricMedian(), 2, Quarantine(), Observers())
    estimator, momenta = WorkerMomentum(), torch.zeros(5, size)
    start, received, lengths = torch.zeros(size), torch.empty(size), []
    for step in range(num_steps):
        gradients = 0.5 + torch.randn(5, size, generator=generator)
        momenta.lerp_(gradients, 0.1)
        if attack is not None:
            honest = momenta[2:].mean(0)
            momenta[:2] = honest + (-1.0) ** step * (momenta[2:] - honest).norm(dim=1).mean() * attack
        matrix = WorkerMatrix([momenta], segments=Segments.of_sizes([size]))
        aggregated = robust.aggregate(matrix, since=[start])
        estimator.limit(["weight"], aggregated.scale)
        estimator.gradient("weight", aggregated.parts[0], received)
        start = estimator.shared_state()["weight"].clone()
        lengths.append(received.norm())
    return torch.stack(lengths)[10:]


def test_liars_who_know_the_signs_of_sketches_gain_no_more_than_others() -> None:
    known = signs_of_sketches(200_000) / 200_000**0.5
    sketch = torch.zeros(1, PERIOD)
    fold(known[None], 0, sketch)
    assert sketches_of(sketch).norm() > 20
    clean, unknowing = lengths_received(None), lengths_received(known[torch.randperm(len(known))])
    attacked = lengths_received(known)
    assert attacked.mean() < 1.05 * unknowing.mean()
    assert attacked.max() < 2 * clean.max()
