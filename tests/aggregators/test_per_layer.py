import copy
from collections.abc import Callable

import numpy as np
import oracles
import pytest
import torch
from cases import RuleCase, name_of
from exemptions import MIXED_TIES, OWN_UNITS, SHORTENS, TIE_OF_TWO
from layers import InTwoLayers, in_two_layers
from shards import in_shards
from torch import Tensor
from vectors import as_list, relative_error, workers

from lightning_byzantine.aggregators import (
    CAF,
    CTMA,
    NNM,
    Aggregator,
    CenteredClipping,
    Clipping,
    CoordinateWiseMedian,
    CoordinateWiseTrimmedMean,
    GeometricMedian,
    Krum,
    MultiKrum,
    PerLayer,
    PersistentFilter,
)
from lightning_byzantine.matrix import Segments, WorkerMatrix

TRIMMED = oracles.coordinate_wise_trimmed_mean
CASES = [
    # A plain tensor is one layer.
    RuleCase(PerLayer(Krum()), oracles.krum, [TIE_OF_TWO]),
    RuleCase(InTwoLayers(PerLayer(Krum())), in_two_layers(oracles.krum), [TIE_OF_TWO]),
    RuleCase(InTwoLayers(NNM(PerLayer(CoordinateWiseTrimmedMean()))), oracles.nnm(in_two_layers(TRIMMED))),
    RuleCase(
        InTwoLayers(CTMA(PerLayer(MultiKrum()))),
        oracles.ctma(in_two_layers(oracles.multi_krum)),
        [TIE_OF_TWO, MIXED_TIES],
    ),
    RuleCase(
        InTwoLayers(PerLayer(CenteredClipping(tau=1.0))),
        in_two_layers(oracles.centered_clipping(1.0)),
        [OWN_UNITS, SHORTENS],
    ),
]

# The third is too small, and belongs to the second.
SIZES = [150, 120, 30, 200]
LAYERS = [slice(0, 150), slice(150, 300), slice(300, 500)]


def per_layer(base: oracles.Oracle) -> oracles.Oracle:
    return lambda rows, f: np.concatenate([base([row[layer] for row in rows], f) for layer in LAYERS])


def called(rule: Aggregator) -> oracles.Oracle:
    """Return as an oracle a rule that is compared with its own elsewhere, whose loops take seconds."""
    return lambda rows, f: rule(torch.from_numpy(np.stack(rows)), num_byzantine=f).numpy()


RULES: list[tuple[Callable[[list[int]], Aggregator], oracles.Oracle]] = [
    (lambda sizes: PerLayer(Krum(), sizes), per_layer(oracles.krum)),
    (lambda sizes: PerLayer(GeometricMedian(), sizes), per_layer(called(GeometricMedian()))),
    (lambda sizes: PerLayer(CAF(), sizes), per_layer(called(CAF()))),
    (lambda sizes: PerLayer(NNM(GeometricMedian()), sizes), per_layer(called(NNM(GeometricMedian())))),
    (lambda sizes: PerLayer(CoordinateWiseMedian(), sizes), oracles.coordinate_wise_median),
    (lambda sizes: CTMA(PerLayer(Krum(), sizes)), oracles.ctma(per_layer(oracles.krum))),
    (lambda sizes: CTMA(NNM(PerLayer(CAF(), sizes))), oracles.ctma(oracles.nnm(per_layer(called(CAF()))))),
    (lambda sizes: Clipping(PerLayer(Krum(), sizes), 30.0), oracles.clipping(per_layer(oracles.krum), 30.0)),
]
every_rule = pytest.mark.parametrize(("make", "oracle"), RULES, ids=[name_of(make([1])) for make, _ in RULES])


@every_rule
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_layers_are_of_the_sizes_given(
    make: Callable[[list[int]], Aggregator], oracle: oracles.Oracle, dtype: torch.dtype
) -> None:
    rows = workers(9, 500, seed=2, dtype=dtype)
    rows[:, 200:] = rows[:, 200:].flip(0)  # each layer has a middle of its own
    expected = oracle(as_list(rows), 3)
    assert relative_error(make(SIZES)(rows, num_byzantine=3), expected, rows) < 1e-5
    for cut in ([500], [140, 20, 340], [1, 299, 200]):
        blocks = make(SIZES).aggregate(WorkerMatrix(rows.split(cut, dim=1)), 3)
        assert relative_error(torch.cat(blocks), expected, rows) < 1e-5
    # As in a sharded exchange, where the sizes are of parameters. The last rank has none of the first two layers.
    segments = Segments.of_sizes(SIZES)
    shards = in_shards(lambda shard: make([1]).aggregate(shard, 3)[0], list(rows.split(125, dim=1)), segments)
    assert relative_error(torch.cat(shards), expected, rows) < 1e-5
    poisoned = torch.cat([rows[:2], torch.full_like(rows[:1], torch.inf), rows[2:]])
    poisoned[2, :499] = 0  # not finite in the last layer
    assert relative_error(make(SIZES)(poisoned, num_byzantine=4), expected, rows) < 1e-5


def test_liars_that_spend_all_in_one_layer_are_left_out() -> None:
    rows = torch.randn(9, 10_200, generator=torch.Generator().manual_seed(0))
    # Without noise, colluders are nearer to the others than these are to each other, unless one looks at the layer.
    rows[5:] = 0
    rows[5:, 10_000:] = 0.9 * (10_200 / 200) ** 0.5
    honest = float(rows[:5, 10_000:].norm(dim=1).max())
    assert Krum()(rows, num_byzantine=4)[10_000:].norm() > 5 * honest
    assert PerLayer(Krum(), [10_000, 200])(rows, num_byzantine=4)[10_000:].norm() <= honest


def test_each_layer_goes_on_from_its_own_last_aggregate() -> None:
    rule, alone = PerLayer(CenteredClipping(tau=2.0), SIZES), [CenteredClipping(tau=2.0) for _ in LAYERS]
    resumed = copy.deepcopy(rule)
    for seed in range(4):
        rows = 4 + workers(6, 500, seed=seed, dtype=torch.float64)
        expected = torch.cat([own(rows[:, layer], num_byzantine=1) for own, layer in zip(alone, LAYERS, strict=True)])
        torch.testing.assert_close(rule(rows, num_byzantine=1), expected)
        torch.testing.assert_close(resumed(rows, num_byzantine=1), expected)
        state = copy.deepcopy(rule.state_dict())
        resumed = PerLayer(CenteredClipping(tau=2.0), SIZES)
        resumed.load_state_dict(state)
    assert list(state["last_aggregate._extra_state"][""].shape) == [500]
    assert state["base.last_aggregate._extra_state"] == {}


def test_without_products_ranks_sum_up_nothing_but_norms() -> None:
    sums = []

    def complete(total: Tensor) -> Tensor:
        sums.append(total.shape)
        return total

    rows = torch.randn(5, 500, generator=torch.Generator().manual_seed(0))
    matrix = WorkerMatrix([rows], complete, segments=Segments.of_sizes(SIZES))
    assert torch.equal(PerLayer(CoordinateWiseMedian()).aggregate(matrix, 2)[0], rows.median(dim=0).values)
    assert sums == [(5,)]
    sums.clear()
    PerLayer(MultiKrum()).aggregate(matrix, 2)
    assert len(sums) == 1


def test_sizes_are_checked(subtests: pytest.Subtests) -> None:
    bad = [
        (TypeError, "sizes must be a list of integers, got 3", lambda: PerLayer(Krum(), sizes=3)),
        (TypeError, "each of sizes must be an int, got 2.5", lambda: PerLayer(Krum(), sizes=[1, 2.5])),
        (ValueError, "each of sizes must be at least 1, got 0", lambda: PerLayer(Krum(), sizes=[3, 0])),
    ]
    for error, message, make in bad:
        with subtests.test(message=message), pytest.raises(error, match=message):
            make()
    message = "sizes must add up to the number of columns, 4, got 5"
    for rule in (PerLayer(Krum(), [2, 3]), CTMA(PerLayer(Krum(), [2, 3])), Clipping(NNM(PerLayer(Krum(), (2, 3))))):
        with subtests.test(rule=rule), pytest.raises(ValueError, match=message):
            rule(torch.zeros(3, 4), num_byzantine=1)


@pytest.mark.parametrize("inner", [PerLayer(Krum()), PersistentFilter()], ids=["PerLayer", "PersistentFilter"])
def test_a_base_must_not_decide_in_each_layer_itself(inner: Aggregator) -> None:
    for base in (inner, CTMA(NNM(inner))):
        with pytest.raises(ValueError, match=f"base must not be {type(inner).__name__} nor contain it: it decides in"):
            PerLayer(base)
