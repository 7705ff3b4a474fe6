"""The optimal order, measured without training."""

from pathlib import Path

import pytest
import torch
from optimal_order import BASES, exponent, main, skewed_rows, worst_errors


@pytest.fixture(scope="module")
def errors() -> dict[str, dict[float, float]]:
    return worst_errors(num_workers=40, num_dimensions=8, num_draws=2)


# These average all rows but f, and so have no bias of their own.
AVERAGES = ("CoordinateWiseTrimmedMean", "MultiKrum")


@pytest.mark.slow
@pytest.mark.parametrize("base", BASES)
def test_ctmas_error_goes_to_0_with_delta(errors: dict[str, dict[float, float]], base: str) -> None:
    curve = errors[f"CTMA({base})"]
    assert curve[0.0] < 1e-20
    assert curve[min(delta for delta in curve if delta > 0)] < 0.2 * curve[max(curve)]


@pytest.mark.slow
@pytest.mark.parametrize("base", [base for base in BASES if base not in AVERAGES])
def test_the_error_of_a_base_that_selects_does_not(errors: dict[str, dict[float, float]], base: str) -> None:
    alone, with_ctma = errors[base], errors[f"CTMA({base})"]
    least = min(delta for delta in alone if delta > 0)
    assert alone[0.0] > 1e-3
    assert with_ctma[least] < alone[least]


def test_the_exponent_is_that_of_a_power_law() -> None:
    assert exponent({0.0: 0.0, **{delta: 3 * delta**1.5 for delta in (0.01, 0.02, 0.05)}}) == pytest.approx(1.5)


def test_rows_are_skewed() -> None:
    rows = skewed_rows(4000, 2, torch.Generator().manual_seed(0))
    torch.testing.assert_close(rows.mean(dim=0), torch.full((2,), 2.0, dtype=torch.float64), atol=0.1, rtol=0)
    assert (rows.median(dim=0).values < 1.8).all()


@pytest.mark.slow
def test_writes_a_picture_and_a_table(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    main(["--workers", "30", "--dimensions", "4", "--draws", "1", "--out", str(tmp_path / "out")])
    assert (tmp_path / "out" / "optimal_order.png").read_bytes().startswith(b"\x89PNG")
    lines = (tmp_path / "out" / "errors.csv").read_text().splitlines()
    assert lines[0] == "rule,delta,error"
    assert "| CTMA(GeometricMedian) |" in capsys.readouterr().out
