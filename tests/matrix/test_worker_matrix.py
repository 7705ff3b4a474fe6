import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from shards import in_shards
from torch import Tensor

from lightning_byzantine.matrix import Segments, WorkerMatrix
from lightning_byzantine.matrix.sketch import WIDTH


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
    median = mixed.coordinatewise(lambda rows: rows.median(0).values)
    torch.testing.assert_close(whole(mixed.materialize(median)), expected.median(0).values)
    torch.testing.assert_close(mixed.distances(median), dense.distances([expected.median(0).values]))
    weights = torch.tensor([0.5, -0.5, 0.2, 0.3, 0.5], dtype=torch.float64)
    center = mixed.combine(weights)
    torch.testing.assert_close(whole(mixed.materialize(center)), weights @ expected)
    torch.testing.assert_close(mixed.distances(center), (expected - weights @ expected).norm(dim=1))
    torch.testing.assert_close(mixed.length(weights - 0.2), ((weights - 0.2) @ expected).norm())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_a_scaled_matrix_is_the_matrix_of_the_scaled_rows(dtype: torch.dtype) -> None:
    vectors, mixing, again = rows().to(dtype), affine(4, 6, seed=1), affine(5, 4, seed=2)
    factors = torch.tensor([1.0, 0.0, -2.0, 0.5], dtype=torch.float64)
    stored = WorkerMatrix(blocks(vectors))
    scaled = stored.mix(mixing).scale(factors).mix(again)
    expected = again @ factors.diag() @ mixing @ vectors.double()
    near = {"rtol": 1e-5, "atol": 1e-5}
    torch.testing.assert_close(scaled.squared_norms(), expected.square().sum(1), **near)
    torch.testing.assert_close(scaled.squared_distances(), WorkerMatrix([expected]).squared_distances(), **near)
    weights = torch.tensor([0.5, -0.5, 0.2, 0.3, 0.5], dtype=torch.float64)
    center = scaled.combine(weights)
    torch.testing.assert_close(whole(scaled.materialize(center)).double(), weights @ expected, **near)
    for matrix, dense in ((scaled, expected), (stored, vectors.double())):
        torch.testing.assert_close(matrix.distances(center), (dense - weights @ expected).norm(dim=1), **near)
    torch.testing.assert_close(scaled.length(weights - 0.2), ((weights - 0.2) @ expected).norm(), **near)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
def test_sketches_tell_how_far_rows_have_moved_along_a_step(dtype: torch.dtype) -> None:
    vectors, start, end = (3 + rows(seed=seed).to(dtype) for seed in range(3))
    start, end = start[0], end[0]
    vectors[1] = torch.nan
    kept = torch.tensor([0, 2, 5])
    step = end.double() - start.double()
    # Of few columns, sketches have the inner products exactly.
    every = torch.cat([vectors[kept].double(), start.double()[None], step[None]])
    near = {"rtol": 1e-4, "atol": 1e-3}

    def check(found: tuple[Tensor, Tensor]) -> None:
        sketches, lengths = found
        torch.testing.assert_close(sketches @ sketches.T, every @ every.T, **near)
        torch.testing.assert_close(lengths, every[-2:].norm(dim=1), **near)

    matrix = WorkerMatrix(blocks(vectors)).select(kept)
    points = [list(point.split([7, 1, 22])) for point in (end, start)]
    check(matrix.sketches(*points))
    sketches, lengths = matrix.sketches(points[0], points[0])
    assert sketches[-1].tolist() == [0.0] * WIDTH
    assert lengths[1] == 0
    with torch.autocast("cpu", torch.bfloat16):
        check(matrix.sketches(*points))


def test_sketches_are_the_same_however_columns_are_cut() -> None:
    names, sizes = ("a", "b", "c"), (500, 30, 470)
    parts = [rows(d=columns, seed=columns) for columns in sizes]
    start, end = rows(d=1000, seed=1)[:2]

    def points_of(order: list[int]) -> list[Tensor]:
        return [torch.cat([point.split(list(sizes))[index] for index in order]) for point in (end, start)]

    def sketches(order: list[int], widths: list[int]) -> list[Tensor]:
        segments = Segments.of_blocks(
            dict(zip(names, sizes, strict=True)), [(tuple(names[i] for i in order), [sizes[i] for i in order])]
        )

        def of_shard(shard: WorkerMatrix) -> Tensor:
            first = sum(widths[: shard.shard])
            columns = slice(first, first + widths[shard.shard])
            return shard.sketches(*([point[columns]] for point in points_of(order)))[0]

        return in_shards(of_shard, list(torch.cat([parts[index] for index in order], dim=1).split(widths, 1)), segments)

    whole = sketches([2, 1, 0], [1000])[0]
    assert whole.shape == (8, WIDTH)
    for found in sketches([0, 2, 1], [1000]) + sketches([0, 1, 2], [500, 500]) + sketches([1, 2, 0], [250] * 4):
        torch.testing.assert_close(found, whole)


def test_what_was_aggregated_before_is_known_to_all_views() -> None:
    matrix = WorkerMatrix(blocks(rows())).with_previous([torch.zeros(7), torch.zeros(1), torch.zeros(22)])
    views = [matrix.select(torch.tensor([0, 2])), matrix.mix(affine(3, 6, seed=0)), matrix.scale(torch.ones(6))]
    for view in [*views, matrix.map_blocks(torch.neg)]:
        assert view.previous is matrix.previous


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
    assert WorkerMatrix([vectors]).measure().is_measurable.tolist() == [True, False, False, False, True, True]
    assert WorkerMatrix([torch.tensor([[1e149], [1e151]], dtype=torch.float64)]).measure().is_measurable.tolist() == [
        True,
        False,
    ]
    # float64 goes farther, half precision is never summed up in half precision.
    assert WorkerMatrix([vectors.double()]).measure().is_measurable.tolist() == [True, False, False, True, True, True]
    assert WorkerMatrix([torch.full((2, 4), 6e4, dtype=torch.float16)]).measure().is_measurable.all()


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


def test_near_ties_are_settled_with_all_digits() -> None:
    """Distances that float32 arithmetic can't tell apart, for one reason or the other."""
    generator = torch.Generator().manual_seed(3)
    row = torch.randn(50_000, generator=generator)
    # Permuted coordinates: the same distance from 0, though sums in another order differ in float32.
    vectors = torch.stack([torch.zeros(50_000), *(row[torch.randperm(50_000, generator=generator)] for _ in range(6))])
    center = torch.eye(7, dtype=torch.float64)[0]
    matrix = WorkerMatrix([vectors])
    assert matrix.nearest(matrix.combine(center), 4).tolist() == [0, 1, 2, 3]
    # The last but one is nearer by a part in ten million.
    vectors[5] *= 1 - 5e-8
    matrix = WorkerMatrix([vectors[:, :20_000], vectors[:, 20_000:]])
    exact = vectors.double().square().sum(1).sort(stable=True).indices
    assert exact[1] == 5
    assert matrix.nearest(matrix.combine(center), 2).tolist() == [0, 5]


@pytest.mark.parametrize("size", [1e-25, 1e-3, 1e15])
def test_the_choice_does_not_depend_on_the_size_of_the_values(size: float) -> None:
    vectors = torch.randn(9, 30_000, generator=torch.Generator().manual_seed(4))
    expected = WorkerMatrix([vectors.double()]).lowest(lambda squared: squared, 5)
    assert torch.equal(WorkerMatrix([vectors * size]).lowest(lambda squared: squared, 5), expected)
    assert torch.equal(WorkerMatrix([vectors * size]).squared_distances() > 0, expected.new_ones(9, 9) > torch.eye(9))


def test_neither_autocast_nor_a_setting_for_fast_products_has_a_say() -> None:
    vectors = torch.randn(17, 9_000, generator=torch.Generator().manual_seed(5))
    matrix = WorkerMatrix([vectors])
    distances, mixed = matrix.squared_distances(), matrix.mix(affine(3, 17, seed=1))
    values = mixed.materialize(mixed.coordinatewise(lambda rows: rows[0] + rows[2]))[0]
    torch.set_float32_matmul_precision("medium")
    try:
        with torch.autocast("cpu", torch.bfloat16):
            again = WorkerMatrix([vectors])
            assert torch.equal(again.squared_distances(), distances)
            mixed = again.mix(affine(3, 17, seed=1))
            assert torch.equal(mixed.materialize(mixed.coordinatewise(lambda rows: rows[0] + rows[2]))[0], values)
        assert torch.backends.mkldnn.matmul.fp32_precision == "bf16"
    finally:
        torch.set_float32_matmul_precision("highest")


def test_a_coordinate_comes_out_the_same_wherever_columns_are_cut() -> None:
    vectors = torch.randn(17, 70_001, generator=torch.Generator().manual_seed(6))
    mixing = affine(17, 17, seed=2)

    def values(cuts: list[int]) -> Tensor:
        matrix = WorkerMatrix(vectors.split(cuts, dim=1)).mix(mixing)
        return torch.cat(matrix.materialize(matrix.coordinatewise(lambda rows: rows[0] + rows[3])))

    whole = values([70_001])
    for cuts in ([1, 70_000], [13, 50_017, 19_971], [64, 69_937], [35_000, 35_001]):
        assert torch.equal(values(cuts), whole)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_distances_from_a_point_of_some_rows_are_from_that_point(dtype: torch.dtype) -> None:
    vectors = rows().to(dtype)
    some = torch.tensor([0, 2, 3])
    matrix = WorkerMatrix(blocks(vectors))
    center = matrix.select(some).coordinatewise(lambda chunk: chunk.sum(0))
    torch.testing.assert_close(matrix.distances(center), (vectors - vectors[some].sum(0)).double().norm(dim=1))


@pytest.mark.parametrize("offset", [0.0, 1e3])
@pytest.mark.parametrize("exact", [False, True])
def test_products_about_a_row_are_off_by_no_more_than_they_say(offset: float, exact: bool) -> None:
    vectors = (offset + rows()).float()
    vectors[4] = vectors[1]
    for matrix in (WorkerMatrix(blocks(vectors)), WorkerMatrix(blocks(vectors)).mix(affine(4, 6, seed=1))):
        dense = (
            torch.eye(6, dtype=torch.float64) if matrix.num_workers == 6 else affine(4, 6, seed=1)
        ) @ vectors.double()
        gram = matrix.products_about(1, exact)
        expected = (dense - dense[1]) @ (dense - dense[1]).T
        assert ((gram.products - expected).abs() <= gram.errors + 1e-9).all()
        assert (gram.errors <= 1e-3).all()
    assert (WorkerMatrix(blocks(vectors)).products_about(1, exact).products[4] == 0).all()
