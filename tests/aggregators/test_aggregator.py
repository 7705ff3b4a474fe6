"""What rules inherit, on a few of them."""

import warnings

import numpy as np
import oracles
import pytest
import torch
from vectors import relative_error, workers

from lightning_byzantine.aggregators import (
    CTMA,
    NNM,
    SMEA,
    Bucketing,
    CoordinateWiseMedian,
    CoordinateWiseTrimmedMean,
    Krum,
    Mean,
    MinimumDiameterAveraging,
)
from lightning_byzantine.matrix import WorkerMatrix


def test_a_matrix_larger_than_one_chunk_gives_the_same_result() -> None:
    rows = workers(5, 250_000, seed=3)
    for rule, oracle in (
        (CoordinateWiseMedian(), oracles.coordinate_wise_median),
        (CTMA(Krum()), oracles.ctma(oracles.krum)),
        (NNM(CoordinateWiseTrimmedMean()), oracles.nnm(oracles.coordinate_wise_trimmed_mean)),
    ):
        assert relative_error(rule(rows, num_byzantine=2), oracle(list(rows.double().numpy()), 2), rows) < 1e-5


def test_blocks_of_several_dtypes_keep_theirs() -> None:
    rows = workers(5, 30, seed=2, dtype=torch.float64)
    blocks = [rows[:, :10].half(), rows[:, 10:20].float(), rows[:, 20:]]
    result = CTMA(NNM(CoordinateWiseMedian())).aggregate(WorkerMatrix(blocks), 2)
    assert [block.dtype for block in result] == [torch.float16, torch.float32, torch.float64]


def test_blocks_without_columns_stay_empty() -> None:
    for rule in (Mean(), Krum(), CTMA(NNM(CoordinateWiseMedian())), CoordinateWiseTrimmedMean()):
        result = rule.aggregate(WorkerMatrix([workers(3, 4, seed=0), torch.empty(3, 0)]), 1)
        assert [len(block) for block in result] == [4, 0]


def test_numpy_integers_are_integers() -> None:
    rows = workers(5, 4, seed=0)
    assert torch.equal(Krum()(rows, num_byzantine=np.int64(2)), Krum()(rows, num_byzantine=2))


def test_works_without_grad_and_in_inference_mode() -> None:
    rows = workers(5, 4, seed=0).requires_grad_()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert not Krum()(rows, 2).requires_grad
        with torch.inference_mode():
            CTMA(NNM(CoordinateWiseMedian()))(rows.detach().clone(), 2)


def test_rules_of_subsets_refuse_what_would_not_end() -> None:
    for rule in (SMEA(), CTMA(MinimumDiameterAveraging()), Bucketing(SMEA(), bucket_size=1)):
        with pytest.raises(ValueError, match=r"100,000 at most, got 92,561,040 with m=33 workers and f=10"):
            rule(torch.zeros(33, 2), num_byzantine=10)
