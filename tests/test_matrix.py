import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from lightning_byzantine.matrix import WorkerMatrix


def rows(m: int = 6, d: int = 30, seed: int = 0) -> Tensor:
    return torch.randn(m, d, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def blocks(vectors: Tensor) -> list[Tensor]:
    return list(vectors.split([7, 1, 22], dim=1))


def whole(parts: list[Tensor]) -> Tensor:
    return torch.cat(parts)


def affine(k: int, m: int, seed: int) -> Tensor:
    weights = torch.rand(k, m, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) - 0.3
    return weights / weights.sum(1, keepdim=True)


def test_a_mixed_matrix_is_the_matrix_of_the_mixed_rows() -> None:
    vectors, mixing, again = rows(), affine(4, 6, seed=1), affine(5, 4, seed=2)
    mixed = WorkerMatrix(blocks(vectors)).mix(mixing).mix(again)
    expected = again @ mixing @ vectors
    dense = WorkerMatrix([expected])
    assert mixed.num_workers == 5
    torch.testing.assert_close(mixed.squared_norms(), expected.square().sum(1))
    torch.testing.assert_close(mixed.squared_distances(), dense.squared_distances())
    median = mixed.coordinatewise(lambda chunk: chunk.median(0).values)
    torch.testing.assert_close(whole(median), expected.median(0).values)
    torch.testing.assert_close(mixed.distances(median), dense.distances([expected.median(0).values]))
    weights = torch.tensor([0.5, -0.5, 0.2, 0.3, 0.5], dtype=torch.float64)
    center = mixed.combine(weights)
    torch.testing.assert_close(whole(mixed.materialize(center)), weights @ expected)
    torch.testing.assert_close(mixed.distances(center), (expected - weights @ expected).norm(dim=1))
    torch.testing.assert_close(mixed.length(weights - 0.2), ((weights - 0.2) @ expected).norm())


def test_a_center_of_one_view_serves_another() -> None:
    vectors = rows()
    matrix = WorkerMatrix(blocks(vectors))
    center = matrix.mix(affine(3, 6, seed=3)).mean()
    expected = affine(3, 6, seed=3).mean(0) @ vectors
    torch.testing.assert_close(matrix.distances(center), (vectors - expected).norm(dim=1))


def test_rows_that_are_not_selected_are_never_read() -> None:
    vectors = rows()
    kept = torch.tensor([0, 2, 5])
    poisoned = vectors.clone()
    poisoned[[1, 3, 4]] = torch.nan
    selected = WorkerMatrix(blocks(poisoned)).select(kept)
    dense = WorkerMatrix([vectors[kept]])
    assert selected.num_workers == 3
    torch.testing.assert_close(selected.squared_distances(), dense.squared_distances())
    torch.testing.assert_close(selected.distances(selected.mean()), dense.distances(dense.mean()))
    torch.testing.assert_close(whole(selected.materialize(selected.mean())), vectors[kept].mean(0))
    mixed = selected.mix(affine(2, 3, seed=1))
    torch.testing.assert_close(whole(mixed.materialize(mixed.mean())), affine(2, 3, seed=1).mean(0) @ vectors[kept])


def test_rows_of_a_mixed_matrix_can_be_selected() -> None:
    vectors, mixing = rows(), affine(4, 6, seed=1)
    selected = WorkerMatrix(blocks(vectors)).mix(mixing).select(torch.tensor([1, 3]))
    torch.testing.assert_close(whole(selected.materialize(selected.mean())), mixing[[1, 3]].mean(0) @ vectors)


def test_rows_may_be_selected_in_any_order() -> None:
    vectors = rows(3)
    selected = WorkerMatrix(blocks(vectors)).select(torch.tensor([2, 0, 1]))
    torch.testing.assert_close(selected.squared_norms(), vectors[[2, 0, 1]].square().sum(1))


def test_measurable_rows() -> None:
    vectors = torch.ones(6, 4)
    vectors[1, 2], vectors[2, 0], vectors[3, 1], vectors[4, 3] = torch.nan, -torch.inf, 2e19, 1e19
    assert WorkerMatrix([vectors]).measurable().tolist() == [True, False, False, False, True, True]
    assert WorkerMatrix([torch.tensor([[1e149], [1e151]], dtype=torch.float64)]).measurable().tolist() == [True, False]
    # float64 goes farther, half precision is never summed up in half precision.
    assert WorkerMatrix([vectors.double()]).measurable().tolist() == [True, False, False, True, True, True]
    assert WorkerMatrix([torch.full((2, 4), 6e4, dtype=torch.float16)]).measurable().all()


@given(seed=st.integers(0, 1000), m=st.integers(1, 10), scale=st.sampled_from([1e-20, 1e-3, 1.0, 1e6]))
def test_distances_are_those_of_a_loop(seed: int, m: int, scale: float) -> None:
    vectors = scale * rows(m, 8, seed)
    squared = WorkerMatrix([vectors]).squared_distances()
    for i in range(m):
        for j in range(m):
            expected = float((vectors[i] - vectors[j]).square().sum())
            assert float(squared[i, j]) == pytest.approx(expected, rel=1e-9, abs=0)


def test_copies_are_at_distance_zero() -> None:
    vectors = torch.full((5, 1000), 0.1) * torch.arange(1, 1001)
    vectors[3:] *= 1.5
    squared = WorkerMatrix([vectors]).squared_distances()
    assert (squared[:3, :3] == 0).all()
    assert (squared[3:, 3:] == 0).all()
    assert (squared[:3, 3:] > 0).all()
