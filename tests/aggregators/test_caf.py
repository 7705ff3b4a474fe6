import oracles
import pytest
import torch
from cases import RuleCase
from exemptions import ITERATIVE

from lightning_byzantine.aggregators import CAF
from lightning_byzantine.matrix import WorkerMatrix

CASES = [RuleCase(CAF(), oracles.caf, [ITERATIVE])]


@pytest.mark.parametrize(("offset", "needs_all_digits"), [(0.0, False), (1.0, True)])
def test_all_digits_are_needed_only_where_the_mean_of_all_is_not_clearly_best(
    offset: float, needs_all_digits: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = torch.randn(9, 3000, generator=torch.Generator().manual_seed(0))
    rows[:3] += offset
    expected = CAF()(rows.double(), num_byzantine=3)
    exact, were_needed = WorkerMatrix.exact_squared_distances, []
    monkeypatch.setattr(
        WorkerMatrix, "exact_squared_distances", lambda matrix: were_needed.append(True) or exact(matrix)
    )
    torch.testing.assert_close(CAF()(rows, num_byzantine=3).double(), expected, rtol=0, atol=1e-6)
    assert bool(were_needed) == needs_all_digits
