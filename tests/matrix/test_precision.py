"""Distances that are easily computed without a single right digit."""

import pytest
import torch

from lightning_byzantine.matrix import WorkerMatrix


@pytest.mark.parametrize("offset", [1e4, 1e6])
@pytest.mark.parametrize("m", [5, 26, 40])
def test_precision_trap_common_offset(m: int, offset: float) -> None:
    """Rows share an offset far larger than their spread; above 25 rows torch.cdist takes a short cut and fails."""
    torch.manual_seed(0)
    rows = (offset + torch.randn(m, 50)).float()
    true = torch.cdist(rows.double(), rows.double(), compute_mode="donot_use_mm_for_euclid_dist")
    torch.testing.assert_close(WorkerMatrix([rows]).squared_distances().sqrt(), true, rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("offset", [0.0, 1e6])
def test_precision_trap_one_row_cannot_take_the_others_digits(offset: float) -> None:
    torch.manual_seed(0)
    rows = (offset + torch.randn(9, 50)).float()
    true = torch.cdist(rows.double(), rows.double(), compute_mode="donot_use_mm_for_euclid_dist")[1:, 1:]
    for huge in (1e12, 1e18):
        rows[0] = huge
        squared = WorkerMatrix([rows]).squared_distances()[1:, 1:]
        torch.testing.assert_close(squared.sqrt(), true, rtol=1e-6, atol=1e-9)


def test_precision_trap_one_coordinate_hides_all_others() -> None:
    torch.manual_seed(0)
    rows = 1e-3 * torch.randn(30, 50)
    rows[:, 0] = 1e10
    true = torch.cdist(rows.double(), rows.double(), compute_mode="donot_use_mm_for_euclid_dist")
    torch.testing.assert_close(WorkerMatrix([rows]).squared_distances().sqrt(), true, rtol=1e-6, atol=1e-12)


def test_clipped_copies_tie() -> None:
    # They are at the same point of the sphere, each with another length.
    rows = torch.tensor([[2.0], [0.0], [-108.0], [0.0], [2.0], [-616.0], [-616.0]])
    distances = WorkerMatrix([rows]).scale(2 / rows.abs().clamp(min=2).flatten()).squared_distances()
    expected = WorkerMatrix([rows.clamp(-2, 2)]).squared_distances()
    assert torch.equal(distances[expected == 0], expected[expected == 0])
    torch.testing.assert_close(distances, expected)
