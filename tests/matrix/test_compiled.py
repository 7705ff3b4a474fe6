"""What is compiled gives the same bits, and is compiled once."""

import copy
import subprocess
import sys

import pytest
import torch
from torch import Tensor
from torch._dynamo.utils import counters

from lightning_byzantine.aggregators import (
    CTMA,
    NNM,
    CoordinateWiseMedian,
    CoordinateWiseTrimmedMean,
)
from lightning_byzantine.matrix import WorkerMatrix
from lightning_byzantine.matrix.compiled import Compiled
from lightning_byzantine.matrix.order_statistics import MeanOfRanks

LENGTH = 9_001


def vectors(m: int = 5, d: int = LENGTH, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(m, d, generator=torch.Generator().manual_seed(m), dtype=torch.float64).to(dtype)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64], ids=str)
def test_the_same_bits_in_every_dtype(dtype: torch.dtype) -> None:
    rows = vectors(dtype=dtype)
    before = rows.clone()
    compiled, plain = CoordinateWiseMedian(compile=True), CoordinateWiseMedian()
    assert torch.equal(compiled(rows, num_byzantine=2), plain(rows, num_byzantine=2))
    assert torch.equal(rows, before)


def test_the_same_bits_under_every_rule_however_columns_are_cut() -> None:
    rows = vectors(6)
    rows[4] *= 30
    for make in (
        CoordinateWiseTrimmedMean,
        lambda **options: CTMA(CoordinateWiseTrimmedMean(**options)),
        lambda **options: CTMA(NNM(CoordinateWiseTrimmedMean(**options))),
    ):
        expected = make()(rows, num_byzantine=2)
        rule = make(compile=True)
        assert torch.equal(rule(rows, num_byzantine=2), expected)
        for cut in ([LENGTH - 1, 1], [4_100, 4_901], [7, 8_900, 94]):
            assert torch.equal(torch.cat(rule.aggregate(WorkerMatrix(rows.split(cut, dim=1)), 2)), expected)


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, 1e20])
@pytest.mark.parametrize("d", [20, LENGTH])
def test_unmeasurable_rows_are_dropped(d: int, bad: float) -> None:
    rows = vectors(6, d)
    rows[3, 17] = bad
    expected = CoordinateWiseMedian()(rows[[0, 1, 2, 4, 5]], num_byzantine=1)
    assert torch.equal(CoordinateWiseMedian(compile=True)(rows, num_byzantine=2), expected)


def test_compiled_once_for_all_numbers_of_columns_and_ways_to_call() -> None:
    function = Compiled(MeanOfRanks((1, 3)))
    function(vectors())
    compiled = counters["stats"]["unique_graphs"]
    for rows in (vectors(d=5_000), vectors()[:, 1:8_000], vectors(d=10_000)[:, 5_000:], vectors().requires_grad_()):
        expected = function.function(rows.detach().clone())
        assert torch.equal(function(rows), expected)
        with torch.no_grad():
            assert torch.equal(function(rows), expected)
    assert counters["stats"]["unique_graphs"] == compiled


def test_in_inference_mode() -> None:
    rows = vectors()
    expected = CTMA(NNM(CoordinateWiseMedian()))(rows, num_byzantine=2)
    with torch.inference_mode():
        for given in (rows, rows.clone()):
            assert torch.equal(CTMA(NNM(CoordinateWiseMedian(compile=True)))(given, num_byzantine=2), expected)


def test_is_an_argument_like_others() -> None:
    assert repr(CoordinateWiseMedian(compile=True)) == "CoordinateWiseMedian(compile=True)"
    assert repr(copy.deepcopy(CoordinateWiseMedian())) == "CoordinateWiseMedian()"
    with pytest.raises(TypeError, match="compile must be True or False, got 'yes'"):
        CoordinateWiseTrimmedMean(compile="yes")


@pytest.mark.slow
def test_says_so_where_there_is_no_compiler(tmp_path: object) -> None:
    program = (
        "import os; os.environ |= dict(CXX='no-such-compiler', PATH='', TORCHINDUCTOR_CACHE_DIR=r'%s')\n"
        "import torch; from lightning_byzantine.aggregators import CoordinateWiseMedian\n"
        "CoordinateWiseMedian(compile=True)(torch.ones(3, 5000), num_byzantine=1)"
    )
    done = subprocess.run([sys.executable, "-c", program % tmp_path], capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert "RuntimeError: compile=True needs what torch.compile needs" in done.stderr
