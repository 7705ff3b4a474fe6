"""The same results on a GPU, where one is there, and that the benchmark for one runs at all."""

import subprocess
import sys
from copy import deepcopy
from pathlib import Path

import pytest
import torch
from combinations import RULES

from lightning_byzantine.aggregators import Aggregator, Krum
from lightning_byzantine.attacks import (
    ALittleIsEnough,
    Attack,
    BitFlip,
    GaussianNoise,
    Intermittent,
    Mimic,
    MinMax,
    NonFinite,
    OptimalALittleIsEnough,
    SignFlip,
    StaleGradient,
)

needs_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")


@needs_cuda
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("rule", RULES, ids=lambda rule: repr(rule).replace("\n", " "))
def test_rules_give_what_they_give_on_the_cpu(rule: Aggregator, dtype: torch.dtype) -> None:
    rows = torch.randn(9, 10_000, generator=torch.Generator().manual_seed(0)).to(dtype)
    rows[2] = torch.nan
    # Bucketing draws anew at every call.
    result = deepcopy(rule)(rows.cuda(), num_byzantine=4)
    assert result.is_cuda
    torch.testing.assert_close(result.cpu(), deepcopy(rule)(rows, num_byzantine=4))


@needs_cuda
@pytest.mark.parametrize(
    "attack",
    [
        SignFlip(),
        ALittleIsEnough(z=1.0),
        GaussianNoise(std=2.0),
        NonFinite(),
        Mimic(),
        MinMax(),
        BitFlip(fraction=0.5),
        StaleGradient(delay=2),
        Intermittent(SignFlip(), probability=0.5),
        OptimalALittleIsEnough(Krum()),
    ],
    ids=repr,
)
def test_attacks_leave_honest_rows_alone(attack: Attack) -> None:
    rows = torch.randn(5, 100).cuda()
    forged, on_cpu = deepcopy(attack)(rows, byzantine=[1]), deepcopy(attack)(rows.cpu(), byzantine=[1])
    torch.testing.assert_close(forged.cpu(), on_cpu, equal_nan=True)
    assert forged.is_cuda
    assert torch.equal(forged[[0, 2, 3, 4]], rows[[0, 2, 3, 4]])


@pytest.mark.slow
def test_the_benchmark_can_be_tried_without_a_gpu(tmp_path: Path) -> None:
    command = [sys.executable, str(Path(__file__).parent / "benchmarks"), "cuda", "--device", "cpu", "--small"]
    subprocess.run([*command, "--only", "correctness", "waits", "--out", str(tmp_path)], check=True)
    assert {path.name for path in tmp_path.iterdir()} >= {"cuda_correctness.csv", "cuda_waits.csv"}
