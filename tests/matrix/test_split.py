"""The columns of each parameter on their own, against a dense matrix of each."""

from collections.abc import Callable

import pytest
import torch
from shards import in_shards
from torch import Tensor

from lightning_byzantine.aggregators import CTMA, Aggregator
from lightning_byzantine.matrix import Combination, Point, Segmented, Segments, WorkerMatrix

# The bias belongs to the weight before it; nobody uses "head".
PARAMETERS = {"first": 150, "first_bias": 5, "middle": 300, "last": 110, "head": 200}
BLOCKS = [("last", None, "middle"), ("first_bias", "first")]
SIZES = [[110, 200, 300], [5, 150]]
SEGMENTS = Segments.of_blocks(PARAMETERS, list(zip(BLOCKS, SIZES, strict=True)))
COLUMNS = {
    "first": [*range(615, 765), *range(610, 615)],
    "middle": [*range(310, 610)],
    "last": [*range(110)],
}
UNUSED = slice(110, 310)


def rows(m: int = 6, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    vectors = torch.randn(m, 765, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    vectors[:, UNUSED] = 0
    return vectors.to(dtype)


def blocks(vectors: Tensor, dtypes: list[torch.dtype] | None = None) -> list[Tensor]:
    parts = list(vectors.split([610, 155], dim=1))
    return parts if dtypes is None else [part.to(dtype) for part, dtype in zip(parts, dtypes, strict=True)]


class Counting:
    """Counts how often ranks would sum up a statistic, and passes it on."""

    def __init__(self) -> None:
        self.count = 0

    def __call__(self, total: Tensor) -> Tensor:
        self.count += 1
        return total


def affine(k: int, m: int, seed: int) -> Tensor:
    weights = torch.rand(k, m, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) - 0.3
    return weights / weights.sum(1, keepdim=True)


FACTORS = torch.tensor([1.0, 0.0, -2.0, 0.5], dtype=torch.float64)
VIEWS: dict[str, tuple[Callable[[WorkerMatrix], WorkerMatrix], Tensor]] = {
    "all": (lambda matrix: matrix, torch.eye(6, dtype=torch.float64)),
    "selected": (lambda matrix: matrix.select(torch.tensor([5, 0, 2])), torch.eye(6, dtype=torch.float64)[[5, 0, 2]]),
    "mixed": (lambda matrix: matrix.mix(affine(4, 6, seed=1)), affine(4, 6, seed=1)),
    "scaled": (lambda matrix: matrix.mix(affine(4, 6, 1)).scale(FACTORS), FACTORS[:, None] * affine(4, 6, 1)),
}


@pytest.mark.parametrize(
    "dtypes",
    [[torch.float32] * 2, [torch.float64] * 2, [torch.bfloat16] * 2, [torch.float64, torch.float32]],
    ids=str,
)
@pytest.mark.parametrize("view", VIEWS)
def test_each_part_is_the_matrix_of_its_columns(view: str, dtypes: list[torch.dtype]) -> None:
    stored = blocks(rows(), dtypes)
    make, weights = VIEWS[view]
    if view == "selected":
        for block in stored:
            block[[1, 3, 4]] = torch.nan  # rows that were dropped
    matrix = make(WorkerMatrix(stored, segments=SEGMENTS))
    dense = weights @ torch.cat([block.double() for block in stored], dim=1).nan_to_num(0)
    for with_products in (True, False):
        parts = matrix.split(with_products)
        assert list(parts) == list(COLUMNS)
        for name, part in parts.items():
            expected = WorkerMatrix([dense[:, COLUMNS[name]]])
            assert part.segments is None
            assert torch.equal(part.workers, matrix.workers)
            torch.testing.assert_close(part.squared_norms(), expected.squared_norms())
            torch.testing.assert_close(part.squared_distances(), expected.squared_distances(), rtol=2e-6, atol=1e-6)
            center = part.combine(affine(1, len(weights), seed=3)[0])
            values = torch.cat(part.materialize(center)).double()
            eps = torch.finfo(dtypes[0] if name != "first" else dtypes[1]).eps
            wanted = affine(1, len(weights), seed=3)[0] @ dense[:, COLUMNS[name]]
            torch.testing.assert_close(values, wanted, rtol=4 * eps, atol=50 * eps)
            torch.testing.assert_close(
                part.distances(center), (dense[:, COLUMNS[name]] - wanted).norm(dim=1), rtol=2e-6, atol=1e-6
            )


def point_of(matrix: WorkerMatrix, dense: Tensor, kind: str, seed: int) -> tuple[Point, Tensor]:
    """Return a point of some columns, and its values."""
    weights = affine(1, len(dense), seed)[0]
    if kind == "combination":
        return matrix.combine(weights), weights @ dense
    if kind == "median":
        return matrix.coordinatewise(lambda chunk: chunk.median(0).values), dense.median(0).values
    given = [torch.full((block.shape[1],), 0.5 + seed, dtype=block.dtype) for block in matrix.blocks]
    return given, torch.full((dense.shape[1],), 0.5 + seed, dtype=torch.float64)


KINDS = [["combination"] * 3, ["median"] * 3, ["given"] * 3, ["combination", "median", "given"]]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("kinds", KINDS, ids=" ".join)
@pytest.mark.parametrize("view", VIEWS)
def test_a_joined_point_has_the_columns_of_each(view: str, kinds: list[str], dtype: torch.dtype) -> None:
    stored = rows().to(dtype)
    make, weights = VIEWS[view]
    whole = WorkerMatrix(blocks(stored), segments=SEGMENTS)
    matrix, dense = make(whole), weights @ stored.double()
    points, expected = [], torch.zeros(765, dtype=torch.float64)
    for seed, (kind, (name, part)) in enumerate(zip(kinds, matrix.split().items(), strict=True)):
        point, values = point_of(part, dense[:, COLUMNS[name]], kind, seed)
        points.append(point)
        expected[COLUMNS[name]] = values
    joined = matrix.join(points)
    eps = max(torch.finfo(dtype).eps, 1e-7)
    found = matrix.materialize(joined)
    assert [part.dtype for part in found] == [dtype] * 2
    torch.testing.assert_close(torch.cat(found).double(), expected, rtol=4 * eps, atol=4 * eps)
    assert (torch.cat(found)[UNUSED] == 0).all()
    # A point serves all views of the same stored rows.
    same_rows = [] if view == "selected" else [(whole, stored.double())]
    for seen, twin in [(matrix, dense), *same_rows]:
        distances = (twin - expected).norm(dim=1)
        torch.testing.assert_close(seen.distances(joined), distances, rtol=1e-5, atol=1e-5)
        assert seen.nearest(joined, 2).tolist() == distances.sort().indices[:2].tolist()


def test_weights_of_a_joined_point_are_averages_over_all_columns() -> None:
    matrix = WorkerMatrix(blocks(rows()), segments=SEGMENTS)
    weights = torch.eye(6, dtype=torch.float64)[[4, 2, 2]]
    parts = list(matrix.split().values())
    joined = matrix.join([part.combine(of_part) for part, of_part in zip(parts, weights, strict=True)])
    assert isinstance(joined, Segmented)
    assert joined.weights is not None
    torch.testing.assert_close(joined.weights[[4, 2]], torch.tensor([155 / 565, 410 / 565], dtype=torch.float64))
    assert matrix.join([parts[0].mean(), parts[1].mean(), torch.zeros(110)]).weights is None


def test_without_segments_there_is_one_part() -> None:
    matrix = WorkerMatrix(blocks(rows()))
    assert list(matrix.split()) == [""]
    assert isinstance(matrix.join([matrix.mean()]), Combination)
    nothing_used = Segments.of_blocks({"weight": 765}, [((None,), [765])])
    assert list(WorkerMatrix([torch.zeros(3, 765)], segments=nothing_used).split()) == [""]


def test_segments_and_the_previous_aggregate_stay_with_all_views() -> None:
    previous = [torch.arange(610.0), torch.arange(155.0)]
    matrix = WorkerMatrix(blocks(rows()), segments=SEGMENTS).with_previous(previous)
    views = [make(matrix) for make, _ in VIEWS.values()]
    for view in [*views, matrix.map_blocks(torch.neg)]:
        assert view.segments is SEGMENTS
        parts = view.split(with_products=False)
        whole = torch.cat(previous)
        for name, part in parts.items():
            assert torch.equal(torch.cat(part.previous), whole[COLUMNS[name]])


# What a pass over the columns costs, and what a sum over ranks.


def test_one_sum_over_ranks_serves_all_parts() -> None:
    complete = Counting()
    for dtype in (torch.float32, torch.float64):
        complete.count = 0
        matrix = WorkerMatrix(blocks(rows(dtype=dtype)), complete, segments=SEGMENTS)
        assert matrix.measure(from_products=True, split=True).is_measurable.all()
        parts = matrix.split().values()
        joined = matrix.join([part.combine(affine(1, 6, seed)[0]) for seed, part in enumerate(parts)])
        for part in parts:
            part.squared_distances(), part.known_norms()
        matrix.products_of_parts(), matrix.known_products_about(joined)
        matrix.known_norms(), matrix.materialize(joined)
        matrix.squared_distances(), matrix.nearest(joined, 3)
        assert complete.count == 1
        matrix.distances(matrix.join([part.combine(torch.eye(6)[2]) for part in parts]))
        assert complete.count <= 2  # where it is at no distance from a row


def test_another_one_serves_all_parts_that_lost_digits() -> None:
    complete = Counting()
    vectors = rows(dtype=torch.float32)
    vectors[:, COLUMNS["first"] + COLUMNS["middle"]] += 1e3
    matrix = WorkerMatrix(blocks(vectors), complete, segments=SEGMENTS)
    for _ in range(3):
        for name, part in matrix.split().items():
            dense = vectors[:, COLUMNS[name]].double()
            torch.testing.assert_close(part.squared_distances().sqrt(), torch.cdist(dense, dense))
    assert complete.count == 2


def test_a_point_that_needs_no_products_computes_none() -> None:
    complete = Counting()
    matrix = WorkerMatrix(blocks(rows()), complete, segments=SEGMENTS)
    medians = [part.coordinatewise(lambda chunk: chunk.median(0).values) for part in matrix.split(False).values()]
    joined = matrix.join(medians)
    torch.testing.assert_close(torch.cat(matrix.materialize(joined)), rows().median(0).values)
    assert matrix.known_products_about(joined) is None
    assert complete.count == 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("offset", [0.0, 50.0])
def test_the_same_bits_wherever_ddp_puts_the_parameters(offset: float, dtype: torch.dtype) -> None:
    sizes = {"a": 70_001, "b": 3, "c": 333, "d": 17, "e": 5_000}  # the first in float32, where rows are
    generator = torch.Generator().manual_seed(0)
    vectors = {n: (offset + torch.randn(5, size, generator=generator)).to(dtype) for n, size in sizes.items()}
    found = []
    for layout in (["a", "b", "c", "d", "e"],), (["e", "d"], ["c", "b", "a"]), (["b", "e", "a"], ["d"], ["c"]):
        stored = [torch.cat([vectors[name] for name in names], dim=1) for names in layout]
        segments = Segments.of_blocks(sizes, [(tuple(names), [sizes[name] for name in names]) for names in layout])
        matrix = WorkerMatrix(stored, segments=segments)
        norms = matrix.measure(from_products=True, split=True).norms
        found.append(torch.cat([norms, matrix.products_of_parts().flatten()]))
    assert torch.equal(found[1], found[0])
    assert torch.equal(found[2], found[0])


# Digits.


OFFSETS = [(torch.float32, 1e4, 1e-3, 1.0), (torch.float64, 1e9, 1e-5, 100.0)]


@pytest.mark.parametrize(("dtype", "offset", "spread", "aside"), OFFSETS, ids=str)
@pytest.mark.parametrize("attack", ["none", "1e18", "aside"])
def test_precision_trap_a_common_offset_in_each_part(
    attack: str, dtype: torch.dtype, offset: float, spread: float, aside: float
) -> None:
    vectors = (offset + spread * rows(9)).to(dtype)
    bad = {"none": [], "1e18": [0], "aside": [0, 1, 2, 3]}[attack]
    for row in bad:
        # Aside: so near that nobody sees it from 0, and so far that nobody sees from there what the others are like.
        vectors[row] = 1e18 if attack == "1e18" else vectors[row] + aside * (1 + 0.2 * row)
    vectors[:, UNUSED] = 0
    honest = [row for row in range(9) if row not in bad]
    for name, part in WorkerMatrix(blocks(vectors), segments=SEGMENTS).split().items():
        assert_distances(part, vectors[:, COLUMNS[name]], honest)


@pytest.mark.parametrize("aside", [0.0, 3.0])
def test_precision_trap_in_more_columns_than_are_summed_up_in_float64(aside: float) -> None:
    vectors = 1e4 + 1e-2 * torch.randn(9, 80_000, generator=torch.Generator().manual_seed(0))
    vectors[:4] += aside * torch.tensor([[1.0], [1.2], [1.4], [1.6]])
    (part, *_) = WorkerMatrix([vectors], segments=Segments.of_sizes([70_000, 10_000])).split().values()
    assert_distances(part, vectors[:, :70_000], list(range(4, 9)))


@pytest.mark.parametrize("offset", [1e3, 1e5, 1e6])
@pytest.mark.parametrize("sizes", [[500, 265], [70_000, 500]])
def test_precision_trap_all_columns_after_those_of_each_part(sizes: list[int], offset: float) -> None:
    vectors = torch.randn(8, sum(sizes), generator=torch.Generator().manual_seed(0))
    vectors[:, -sizes[1] :] += offset
    matrix, whole = WorkerMatrix([vectors], segments=Segments.of_sizes(sizes)), WorkerMatrix([vectors])
    matrix.measure(from_products=True, split=True)
    matrix.split()
    assert_squared_distances(matrix.squared_distances(), vectors)
    assert torch.equal(matrix.lowest(lambda squared: squared, 4), whole.lowest(lambda squared: squared, 4))
    scaled = torch.linspace(0.9, 1.1, 8)[:, None]
    assert_squared_distances(matrix.scale(scaled[:, 0]).squared_distances(), vectors.double() * scaled.double())


def assert_squared_distances(found: Tensor, vectors: Tensor) -> None:
    dense = vectors.double()
    torch.testing.assert_close(found, (dense[:, None] - dense).square().sum(2), rtol=2e-6, atol=1e-12)


def assert_distances(part: WorkerMatrix, vectors: Tensor, honest: list[int]) -> None:
    """Check the distances between some rows, and inner products about one of them."""
    dense = vectors[honest].double()
    expected = (dense[:, None] - dense).square().sum(2)
    assert expected[0, 1] > 0
    products = part.products_of_parts()[0, honest][:, honest]
    differences = products.diagonal() + products.diagonal()[:, None] - 2 * products
    torch.testing.assert_close(differences, expected, rtol=1e-4, atol=1e-12)
    squared = part.squared_distances()[honest][:, honest]
    torch.testing.assert_close(squared, expected, rtol=2e-6, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_copies_are_at_no_distance(dtype: torch.dtype) -> None:
    vectors = rows(9, dtype=dtype)
    vectors[[1, 5, 7]] = vectors[3].clone()
    for part in WorkerMatrix(blocks(vectors), segments=SEGMENTS).split().values():
        squared = part.squared_distances()
        copies = torch.tensor([1, 3, 5, 7])
        assert (squared[copies][:, copies] == 0).all()
        assert (squared == 0).sum() == 16 + 5


# Shards.


class SumOfDistances(Aggregator):
    """Needs distances and norms of each part, and of joined points."""

    uses_products = True

    def locate(self, matrix: WorkerMatrix, num_byzantine: int) -> Point:
        parts = matrix.split()
        points: list[Point] = []
        for index, part in enumerate(parts.values()):
            median = part.coordinatewise(lambda chunk: chunk.median(0).values)
            near = part.nearest(median if index else part.mean(), 2)
            points.append(part.combine(torch.eye(part.num_workers, dtype=torch.float64)[near].mean(0)))
        kept = matrix.nearest(matrix.join(points), matrix.num_workers - num_byzantine)
        return matrix.combine(torch.eye(matrix.num_workers, dtype=torch.float64)[kept].mean(0))


def zeroed(vectors: Tensor) -> Tensor:
    vectors[:, COLUMNS["last"]] = 0  # where all agree, whether a product may have underflowed must not matter
    return vectors


@pytest.mark.parametrize("dtypes", [[torch.float32] * 2, [torch.float64, torch.float32]], ids=str)
@pytest.mark.parametrize("change", [lambda vectors: vectors, zeroed], ids=["all", "with zeros"])
def test_ranks_compute_the_same_even_those_that_have_none_of_a_part(
    change: Callable[[Tensor], Tensor], dtypes: list[torch.dtype]
) -> None:
    vectors = blocks(change(rows(7)), dtypes)
    vectors[0][2, 600] = torch.nan
    expected = SumOfDistances().aggregate(WorkerMatrix(vectors, segments=SEGMENTS), 3)
    # Of seven ranks, those in the middle have none of "last", and those at the start none of "middle".
    padded = [torch.nn.functional.pad(block, (0, -block.shape[1] % 7)) for block in vectors]
    shards = [list(pair) for pair in zip(*(block.chunk(7, dim=1) for block in padded), strict=True)]
    for rule in (SumOfDistances(), CTMA(SumOfDistances())):
        results = in_shards(lambda matrix: rule.aggregate(matrix, 3), shards, SEGMENTS)  # noqa: B023
        expected = rule.aggregate(WorkerMatrix(vectors, segments=SEGMENTS), 3)
        for index, block in enumerate(expected):
            whole = torch.cat([result[index] for result in results])[: len(block)]
            assert torch.equal(whole, block)
