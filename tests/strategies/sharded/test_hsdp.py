"""With the mean, training is that of PyTorch's own HSDP."""

from functools import cache
from itertools import product
from typing import Any

import pytest
import torch
from rank_pool import RankPool
from sharded_models import fit_hsdp, fit_replicas
from torch import Tensor

from lightning_byzantine.aggregators import Mean

# name: model, arguments of both loops
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "plain": ("Sharded", {}),
    "one unit": ("OneUnit", {}),
    "accumulation": ("Sharded", {"accumulate_grad_batches": 2}),
    "clipping": ("Sharded", {"gradient_clip_val": 0.1}),
    "frozen and unused": ("Unused", {}),
    "tied": ("Tied", {}),
    "nested": ("Nested", {}),
    "activation checkpointing": ("Checkpointed", {}),
    "bf16": ("InBfloat16", {}),
}
SHAPES = {"2 x 2": ("four_ranks", (2, 2)), "3 x 2": ("six_ranks", (3, 2))}
ESTIMATORS = {"none": None, "momentum": "auto"}
# Gradients are float32, but those of the next step are computed with parameters in bfloat16, which may round otherwise.
OF_MOMENTUM = {"bf16": 1e-3}


@cache
def stock(pool: RankPool, shape: tuple[int, int], case: str) -> Tensor:
    name, arguments = CASES[case]
    history: Tensor = pool.run(fit_hsdp, shape, name, **arguments)[0]
    return history


ROWS = [
    *product(CASES, ["2 x 2"], ["all_gather", "all_to_all"], ESTIMATORS),
    *product(CASES, ["3 x 2"], ["all_to_all"], ["none"]),
]


def is_quick(index: int, shape: str, exchange: str, estimator: str) -> bool:
    """Return whether this is the one of a case's rows that is not slow: each case has another one."""
    of_case = ["all_gather", "all_to_all"][index % 2], list(ESTIMATORS)[index // 2 % 2]
    return shape == "2 x 2" and (exchange, estimator) == of_case


@pytest.mark.parametrize(
    ("case", "shape", "exchange", "estimator"),
    [
        pytest.param(*row, marks=() if is_quick(list(CASES).index(row[0]), *row[1:]) else pytest.mark.slow)
        for row in ROWS
    ],
)
def test_trains_like_hsdp_with_the_mean(
    request: pytest.FixtureRequest, case: str, shape: str, exchange: str, estimator: str
) -> None:
    fixture, sizes = SHAPES[shape]
    pool = request.getfixturevalue(fixture)
    name, arguments = CASES[case]
    first, *others = pool.run(
        fit_replicas,
        sizes,
        name,
        aggregator=Mean(),
        estimator=ESTIMATORS[estimator],
        exchange=exchange,
        **arguments,
    )
    expected = stock(pool, sizes, case)
    assert all(torch.equal(first, other) for other in others)
    assert not torch.equal(expected[0], expected[-1])
    tolerance = 1e-6 if estimator == "none" else OF_MOMENTUM.get(case, 1e-5)
    torch.testing.assert_close(first, expected, atol=tolerance, rtol=0)
