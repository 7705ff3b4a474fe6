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
    Krum,
    Mean,
    MultiKrum,
    PerLayer,
    PersistentFilter,
)
from lightning_byzantine.estimators.estimator import Scale
from lightning_byzantine.matrix import Segments, WorkerMatrix

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
