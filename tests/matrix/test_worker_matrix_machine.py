"""Views of a matrix in blocks and shards, made in any order, against a dense matrix of float64."""

from collections.abc import Callable, Sequence
from copy import deepcopy
from dataclasses import dataclass, field, replace
from typing import Any, TypeVar

import torch
from hypothesis import assume, settings
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, initialize, invariant, rule
from torch import Tensor

from lightning_byzantine.matrix import Segments, WorkerMatrix

Result = TypeVar("Result")

DTYPES = (torch.float32, torch.float64, torch.float16, torch.bfloat16)
FUNCTIONS: list[Callable[[Tensor], Tensor]] = [
    lambda rows: rows.median(0).values,
    lambda rows: rows.amax(0),
    lambda rows: rows.neg_()[0].neg(),  # writes to what it is given
]
STATISTICS: list[Callable[[Tensor], Tensor]] = [lambda squared: squared, lambda squared: squared.sum(0)]


class SumWantedError(Exception):
    pass


class Ranks:
    """Ranks one after the other, each of which starts again whenever the others' part of a sum is known."""

    def __init__(self, num_ranks: int) -> None:
        self.num_ranks = num_ranks
        self._sums: list[Tensor] = []
        self._known = iter(self._sums)
        self._parts: list[Tensor] = []

    def ask(self, question: Callable[..., Result], *arguments: Sequence[Any]) -> list[Result]:
        """Return ``question(*arguments of the rank)`` of every rank; one rank alone keeps what it has computed."""
        if self.num_ranks == 1:
            return [question(*(argument[0] for argument in arguments))]
        self._sums = []
        while True:
            self._parts = []
            answers = [self._answer(question, [argument[rank] for argument in arguments]) for rank in self.every]
            if not self._parts:
                return answers
            assert len(self._parts) == self.num_ranks, "some ranks call a collective that others don't"
            self._sums.append(torch.stack(self._parts).sum(0))

    @property
    def every(self) -> range:
        return range(self.num_ranks)

    def complete(self, total: Tensor) -> Tensor:
        """Sum a statistic over the ranks."""
        assert total.dtype == torch.float64
        if self.num_ranks == 1:
            return total
        for done in self._known:
            return done.clone()
        self._parts.append(total)
        raise SumWantedError

    def _answer(self, question: Callable[..., Result], arguments: list[Any]) -> Any:
        self._known = iter(self._sums)
        try:
            return question(*deepcopy(arguments))
        except SumWantedError:
            return None


@dataclass(frozen=True, eq=False)
class Stored:
    """Rows as they are stored, [n, d], and where each rank has which columns in which of its blocks."""

    dense: Tensor
    blocks: list[list[Tensor]]
    columns: list[list[range]]
    is_finite: bool = True
    groups: dict[str, list[list[list[int]]]] = field(default_factory=dict)  # for each, each rank's columns by block

    @classmethod
    def cut(cls, parts: list[Tensor], num_ranks: int) -> "Stored":
        """Give each rank its share of the columns of each part."""
        blocks = [list(shares) for shares in zip(*(part.tensor_split(num_ranks, dim=1) for part in parts), strict=True)]
        return cls.of(blocks)

    @classmethod
    def of(cls, blocks: list[list[Tensor]]) -> "Stored":
        start, columns, pieces = 0, [], []
        for shares in blocks:
            columns.append([])
            for block in shares:
                columns[-1].append(range(start, start := start + block.shape[1]))
                pieces.append(block.double())
        return cls(torch.cat(pieces, dim=1), [[block.clone() for block in shares] for shares in blocks], columns)

    def of_columns(self, number: Callable[[torch.dtype], float]) -> Tensor:
        """Return a number that depends on a column's dtype, [d]."""
        numbers = torch.empty(self.dense.shape[1], dtype=torch.float64)
        for shares, places in zip(self.blocks, self.columns, strict=True):
            for block, columns in zip(shares, places, strict=True):
                numbers[list(columns)] = number(block.dtype)
        return numbers

    def joined(self, points: list[list[Tensor]]) -> Tensor:
        """Return as one [d] vector what each rank has of it, in the blocks' dtypes."""
        whole = torch.full((self.dense.shape[1],), torch.nan, dtype=torch.float64)
        for point, shares, places in zip(points, self.blocks, self.columns, strict=True):
            for values, block, columns in zip(point, shares, places, strict=True):
                assert values.dtype == block.dtype
                whole[list(columns)] = values.double()
        return whole

    def parts(self, vector: Tensor, rank: int) -> list[Tensor]:
        """Return what a rank has of a [d] vector, in the blocks' dtypes."""
        return [
            vector[list(columns)].to(block.dtype)
            for block, columns in zip(self.blocks[rank], self.columns[rank], strict=True)
        ]


@dataclass(frozen=True, eq=False)
class View:
    """The same rows twice: as matrices, one a rank, and as weights of stored rows, [m, n]."""

    matrices: list[WorkerMatrix]
    stored: Stored
    weights: Tensor

    @property
    def dense(self) -> Tensor:
        return self.weights @ self.stored.dense

    @property
    def terms(self) -> Tensor:
        """The sum of the sizes of what each value is the sum of, [m, d]: rounding is in proportion to it."""
        return self.weights.abs() @ self.stored.dense.abs()

    @property
    def sizes(self) -> Tensor:
        """The same for whole rows, [m]."""
        return self.weights.abs() @ self.stored.dense.norm(dim=1)

    def rounding(self, terms: Tensor) -> Tensor:
        """Return how far a sum over stored rows may be off, in the dtype it is computed in."""
        widened = lambda dtype: torch.finfo(torch.promote_types(dtype, torch.float32)).eps  # noqa: E731
        return (2 + len(self.stored.dense)) * self.stored.of_columns(widened) * terms


def divided(stored: Stored, sizes: list[int], segment_of: list[int]) -> tuple[Stored, list[Segments]]:
    """Say of each column to which segment it belongs; return each rank's segments.

    Args:
        stored: with d columns.
        sizes: of the segments, of which those under 100 go with the one before, and the first with those after it.
        segment_of: [d].

    """
    group_of: list[int] = []
    for index, size in enumerate(sizes):
        alone = index == 0 or (size >= 100 and sum(sizes[group_of[-1] : index]) >= 100)
        group_of.append(index if alone else group_of[-1])
    names = [f"p{index}" for index in range(len(sizes))]
    used = tuple(sorted(set(segment_of)))
    groups: dict[str, list[list[list[int]]]] = {
        names[group]: [[] for _ in stored.columns] for group in sorted({group_of[index] for index in used})
    }
    of_ranks = []
    for rank, places in enumerate(stored.columns):
        of_blocks: list[list[tuple[int, slice]]] = [[] for _ in places]
        for segment in range(len(sizes)):
            for of_block, columns in zip(of_blocks, places, strict=True):
                own = [index for index, column in enumerate(columns) if segment_of[column] == segment]
                if own:  # neighbours, as the columns of a parameter are
                    of_block.append((segment, slice(own[0], own[-1] + 1)))
                    groups[names[group_of[segment]]][rank].append([columns[index] for index in own])
        of_ranks.append(Segments(tuple(names), tuple(sizes), tuple(map(tuple, of_blocks)), used))
    return replace(stored, groups=groups), of_ranks


def random(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def affine(k: int, m: int, seed: int) -> Tensor:
    weights = 1 / m + 0.3 * random(k, m, seed=seed)
    return weights + (1 - weights.sum(1, keepdim=True)) / m


def copies(rows: Tensor) -> list[tuple[int, int]]:
    return [(i, j) for j in range(len(rows)) for i in range(j) if torch.equal(rows[i], rows[j])]


def assert_order(chosen: list[int], values: Tensor, tolerance: Tensor) -> None:
    """Check that indices are of the lowest values, lowest first, as far as the values' digits go."""
    assert len(set(chosen)) == len(chosen)
    lowest = values.sort().values[: len(chosen)]
    assert ((values[chosen] - lowest).abs() <= 2 * tolerance.max()).all()


def assert_copies_are_in_order(chosen: list[int], rows: Tensor) -> None:
    for first, second in copies(rows):
        if second in chosen:
            assert first in chosen[: chosen.index(second)]


seeds = st.integers(0, 2**16)
few = [0, 1, 3, 17, 64]
widths = st.one_of(
    st.lists(st.sampled_from(few), min_size=1, max_size=3),
    st.lists(st.sampled_from([*few, 4200]), min_size=1, max_size=2),  # more than are summed up in float32 at a time
)
dtypes = st.one_of(
    st.sampled_from(DTYPES).map(lambda dtype: [dtype] * 3), st.lists(st.sampled_from(DTYPES), min_size=3, max_size=3)
)


@st.composite
def stored_rows(draw: Callable[..., Any], num_rows: int) -> list[Tensor]:
    """Rows of several sizes, far from 0 or not, some of them copies of others; cut into blocks of several dtypes."""
    lengths = draw(widths)
    rows = draw(st.sampled_from([1e-2, 1.0, 10.0])) * random(num_rows, sum(lengths), seed=draw(seeds))
    rows += draw(st.sampled_from([0.0, 0.0, 100.0]))
    for row in range(1, num_rows):
        if draw(st.integers(0, 4)) == 0:
            rows[row] = rows[draw(st.integers(0, row - 1))]
    return [
        block.to(dtype) for block, dtype in zip(rows.split(lengths, dim=1), draw(dtypes)[: len(lengths)], strict=True)
    ]


class Machine(RuleBasedStateMachine):
    """Makes views of views, and compares what they say of themselves with what is so."""

    views = Bundle("views")

    @initialize(target=views, num_ranks=st.sampled_from([1, 1, 2, 3]), num_rows=st.integers(1, 7), data=st.data())
    def start(self, num_ranks: int, num_rows: int, data: st.DataObject) -> View:
        self.ranks = Ranks(num_ranks)
        self.kept: list[tuple[WorkerMatrix, list[Tensor]]] = []
        stored = Stored.cut(data.draw(stored_rows(num_rows)), num_ranks)
        complete = lambda total: self.ranks.complete(total)  # noqa: E731 # a method would be copied with its object
        if not data.draw(st.booleans()):
            return self.root(stored, lambda rank, blocks: WorkerMatrix(blocks, complete, rank))
        # Neighbouring columns of the whole, which are in several blocks and on several ranks.
        sizes = data.draw(st.lists(st.sampled_from([10, 100]), min_size=1, max_size=4))
        d, last = stored.dense.shape[1], len(sizes) - 1
        cuts = sorted(data.draw(st.lists(st.integers(0, d), min_size=last, max_size=last)))
        order = data.draw(st.permutations(range(len(sizes))))
        segment_of = [order[sum(column >= cut for cut in cuts)] for column in range(d)]
        stored, segments = divided(stored, sizes, segment_of)
        return self.root(stored, lambda rank, blocks: WorkerMatrix(blocks, complete, rank, segments=segments[rank]))

    def root(self, stored: Stored, make: Callable[[int, list[Tensor]], WorkerMatrix]) -> View:
        matrices = [make(rank, blocks) for rank, blocks in enumerate(stored.blocks)]
        self.kept += [(matrix, [block.clone() for block in matrix.blocks]) for matrix in matrices]
        return View(matrices, stored, torch.eye(len(stored.dense), dtype=torch.float64))

    def asked(self, question: Callable[..., Tensor], view: View, *arguments: Sequence[Any]) -> Tensor:
        """Return the answer of all ranks, which must be the same."""
        first, *others = self.ranks.ask(question, view.matrices, *arguments)
        assert len(others) == self.ranks.num_ranks - 1
        assert all(torch.equal(first, other) for other in others)
        return first

    def joined(self, view: View, points: Sequence[Any]) -> Tensor:
        """Return the values of a point, [d]."""
        return view.stored.joined(self.ranks.ask(WorkerMatrix.materialize, view.matrices, points))

    @invariant()
    def nothing_is_written_to(self) -> None:
        for matrix, blocks in getattr(self, "kept", []):
            assert all(torch.equal(*pair) for pair in zip(matrix.blocks, blocks, strict=True))

    # Views.

    @rule(target=views, view=views, data=st.data())
    def selected(self, view: View, data: st.DataObject) -> View:
        return self.select(view, data)

    def select(self, view: View, data: st.DataObject) -> View:
        every = list(range(view.matrices[0].num_workers))
        rows = torch.tensor(data.draw(st.lists(st.sampled_from(every), min_size=1, unique=True)))
        return View([matrix.select(rows) for matrix in view.matrices], view.stored, view.weights[rows])

    @rule(target=views, view=views, num_rows=st.integers(1, 5), seed=seeds)
    def mix(self, view: View, num_rows: int, seed: int) -> View:
        weights = affine(num_rows, len(view.weights), seed)
        mixed = replace(view, matrices=[matrix.mix(weights) for matrix in view.matrices])
        return bounded(replace(mixed, weights=weights @ view.weights))

    @rule(target=views, view=views, data=st.data())
    def scale(self, view: View, data: st.DataObject) -> View:
        size = len(view.weights)
        factors = data.draw(st.lists(st.sampled_from([0.0, 0.3, 1.0, -2.0]), min_size=size, max_size=size))
        factors = torch.tensor(factors, dtype=torch.float64)
        scaled = replace(view, matrices=[matrix.scale(factors) for matrix in view.matrices])
        return bounded(replace(scaled, weights=factors[:, None] * view.weights))

    @rule(target=views, view=views, factor=st.sampled_from([-1.0, 0.5]))
    def map_blocks(self, view: View, factor: float) -> View:
        assume(view.stored.is_finite)
        matrices = [matrix.map_blocks(lambda block: factor * block) for matrix in view.matrices]
        stored = replace(Stored.of([matrix.blocks for matrix in matrices]), groups=view.stored.groups)
        torch.testing.assert_close(stored.dense, factor * view.stored.dense, rtol=0, atol=1e-7)
        return self.root(stored, lambda rank, _: matrices[rank])

    @rule(target=views, view=views, num_rows=st.integers(1, 7), seed=seeds)
    def with_blocks(self, view: View, num_rows: int, seed: int) -> View:
        values = random(num_rows, view.stored.dense.shape[1], seed=seed)
        blocks = [
            [values[:, list(columns)].to(block.dtype) for block, columns in zip(shares, places, strict=True)]
            for shares, places in zip(view.stored.blocks, view.stored.columns, strict=True)
        ]
        stored = replace(Stored.of(blocks), groups=view.stored.groups)
        return self.root(stored, lambda rank, blocks: view.matrices[rank].with_blocks(blocks))

    @rule(target=views, view=views, value=st.sampled_from([torch.nan, torch.inf]), data=st.data())
    def around_rows_that_are_not_finite(self, view: View, value: float, data: st.DataObject) -> View:
        num_rows, num_columns = view.stored.dense.shape
        assume(num_rows > 1 and num_columns > 0)
        bad = data.draw(st.lists(st.integers(0, num_rows - 1), min_size=1, max_size=num_rows - 1, unique=True))
        column = data.draw(st.integers(0, num_columns - 1))
        blocks = [[block.clone() for block in shares] for shares in view.stored.blocks]
        for shares, places in zip(blocks, view.stored.columns, strict=True):
            for block, columns in zip(shares, places, strict=True):
                if column in columns:
                    block[bad, columns.index(column)] = value
        poisoned = self.root_of_poisoned(view, blocks)
        measurable = self.asked(lambda matrix: matrix.measure().is_measurable, poisoned)
        assert measurable.tolist() == [row not in bad for row in range(num_rows)]
        good = measurable.nonzero().flatten()
        matrices = [matrix.select(good) for matrix in poisoned.matrices]
        return View(matrices, poisoned.stored, poisoned.weights[good])

    def root_of_poisoned(self, view: View, blocks: list[list[Tensor]]) -> View:
        matrices = [matrix.with_blocks(shares) for matrix, shares in zip(view.matrices, blocks, strict=True)]
        stored = Stored.of(blocks)
        # What must never be read counts as 0 in the dense twin.
        stored = replace(view.stored, dense=stored.dense.nan_to_num(0, 0, 0), is_finite=False)
        return View(matrices, stored, torch.eye(len(stored.dense), dtype=torch.float64))

    @rule(target=views, view=views, with_products=st.booleans(), data=st.data())
    def split(self, view: View, with_products: bool, data: st.DataObject) -> View:
        groups = view.stored.groups
        assume(groups)
        parts = self.ranks.ask(lambda matrix: matrix.split(with_products), view.matrices)
        assert all(list(of_rank) == list(groups) for of_rank in parts)
        name = data.draw(st.sampled_from(list(groups)))
        matrices = [of_rank[name] for of_rank in parts]
        stored = Stored.of([matrix.blocks for matrix in matrices])
        columns = [column for of_rank in groups[name] for of_block in of_rank for column in of_block]
        finite = stored.dense.nan_to_num(0, 0, 0)
        assert torch.equal(finite[view.matrices[0].workers], view.stored.dense[:, columns][view.matrices[0].workers])
        return View(matrices, replace(stored, dense=finite, is_finite=view.stored.is_finite), view.weights)

    # What is so of them.

    @rule(view=views, seed=seeds, data=st.data())
    def statistics(self, view: View, seed: int, data: st.DataObject) -> None:
        self.check_squared_norms(view)
        self.check_squared_distances(view)
        for statistic in STATISTICS:
            self.check_lowest(view, statistic, data)
        self.check_length(view, seed)

    @rule(view=views, other=views, seed=seeds, data=st.data())
    def points(self, view: View, other: View, seed: int, data: st.DataObject) -> None:
        self.check_combinations(view, other, seed, data)
        for function in FUNCTIONS:
            self.check_coordinatewise(view, other, function, data)
        self.check_given_points(view, seed, data)

    @rule(view=views, kinds=st.lists(st.integers(0, 2), min_size=4, max_size=4), seed=seeds, data=st.data())
    def joined_points(self, view: View, kinds: list[int], seed: int, data: st.DataObject) -> None:
        groups = view.stored.groups
        assume(groups)
        size, vector = len(view.weights), random(view.stored.dense.shape[1], seed=seed)
        weights = dict(zip(groups, affine(len(groups), size, seed), strict=True))
        function = FUNCTIONS[0]

        def join(matrix: WorkerMatrix, rank: int) -> Any:
            points: list[Any] = []
            for kind, (name, part) in zip(kinds, matrix.split(with_products=seed % 2 == 0).items(), strict=False):
                columns = groups[name][rank] or [[]]
                given = [vector[own].to(block.dtype) for own, block in zip(columns, part.blocks, strict=True)]
                points.append([part.combine(weights[name]), part.coordinatewise(function), given][kind])
            return matrix.join(points)

        expected = view.stored.joined([view.stored.parts(vector, rank) for rank in self.ranks.every])
        rounding, sizes = torch.zeros_like(expected), view.sizes
        for kind, name in zip(kinds, groups, strict=False):
            columns = [column for of_rank in groups[name] for own in of_rank for column in own]
            if kind < 2:
                dense, terms = view.dense[:, columns], view.terms[:, columns]
                expected[columns] = function(dense) if kind else weights[name] @ dense
                terms = terms.amax(0) if kind else weights[name].abs() @ terms
                rounding[columns] = view.rounding(replace_columns(view, columns, terms))[columns]
                sizes = sizes + weights[name].abs() @ view.sizes
        points = self.ranks.ask(join, view.matrices, self.ranks.every)
        assert_values(view, self.joined(view, points), expected, rounding)
        distances = (view.dense - expected).norm(dim=1)
        off = rounding.norm() + view.rounding(view.terms).norm(dim=1)
        tolerance = 2e-6 * distances.square() + 1e-12 * (sizes + expected.norm()).square() + off * (2 * distances + off)
        found = self.asked(WorkerMatrix.distances, view, points)
        assert near(found.square(), distances.square(), tolerance)
        exact = 1e-9 * distances.square() + 1e-12 * (sizes + expected.norm()).square() + off * (2 * distances + off)
        self.check_nearest(view, points, distances.square(), exact, data)

    def check_squared_norms(self, view: View) -> None:
        expected, tolerance = view.dense.square().sum(1), 1e-12 * view.sizes.square()
        assert view.matrices[0].num_workers == len(expected)
        assert near(self.asked(WorkerMatrix.squared_norms, view), expected, tolerance)
        measured = self.asked(lambda matrix: matrix.measure().norms, view)
        assert near(measured, expected.sqrt(), 1e-5 * view.sizes)

    def check_squared_distances(self, view: View) -> None:
        expected, tolerance = pairwise_squared_distances(view)
        # Known to six digits, unless they are next to nothing.
        assert near(self.asked(WorkerMatrix.squared_distances, view), expected, 2e-6 * expected + tolerance)
        exact = self.asked(WorkerMatrix.exact_squared_distances, view)
        assert near(exact, expected, 1e-9 * expected + tolerance)
        for first, second in copies(view.weights @ view.stored.dense):
            assert exact[first, second] <= tolerance[first, second]

    def check_lowest(self, view: View, statistic: Callable[[Tensor], Tensor], data: st.DataObject) -> None:
        size = len(view.weights)
        count = data.draw(st.integers(1, size))
        expected, tolerance = pairwise_squared_distances(view)
        values, errors = statistic(expected), statistic(1e-9 * expected + tolerance)
        chosen = self.asked(lambda matrix: matrix.lowest(statistic, count), view)
        for row, one, error in zip(chosen.view(-1, count), values.view(-1, size), errors.view(-1, size), strict=True):
            assert_order(row.tolist(), one, error)

    def check_combinations(self, view: View, other: View, seed: int, data: st.DataObject) -> None:
        same_rows = other.stored is view.stored and torch.equal(other.matrices[0].workers, view.matrices[0].workers)
        made_of = other if same_rows else view
        is_mean = data.draw(st.booleans())
        size = len(made_of.weights)
        weights = torch.full((size,), 1 / size, dtype=torch.float64) if is_mean else affine(1, size, seed)[0]
        points = [matrix.mean() if is_mean else matrix.combine(weights) for matrix in made_of.matrices]
        total = weights @ made_of.weights
        center = replace(view, weights=total[None])

        assert_values(center, self.joined(made_of, points), center.dense[0], view.rounding(center.terms[0]))

        squared, tolerance = squared_distances_from(view, center)
        found = self.asked(WorkerMatrix.distances, view, points)
        assert near(found.square(), squared, 2e-6 * squared + tolerance)
        self.check_nearest(view, points, squared, 1e-9 * squared + tolerance, data)

    def check_coordinatewise(
        self, view: View, other: View, function: Callable[[Tensor], Tensor], data: st.DataObject
    ) -> None:
        # As of a rule that leaves out rows, whose distances from the point matter all the same.
        made_of = other if other.stored is view.stored and other is not view else self.select(view, data)
        points = [matrix.coordinatewise(function) for matrix in made_of.matrices]
        expected = function(made_of.dense)
        rounding = view.rounding(made_of.terms.amax(0))

        def check_values() -> None:
            assert_values(view, self.joined(made_of, points), expected, rounding)

        values_first = data.draw(st.booleans())
        if values_first:
            check_values()
        distances = (view.dense - expected).norm(dim=1)
        tolerance = 2e-6 * distances + rounding.norm() + view.rounding(view.terms).norm(dim=1)
        found = self.asked(WorkerMatrix.distances, view, points)
        assert near(found, distances, tolerance)
        self.check_nearest(view, points, distances, tolerance, data)
        if not values_first:
            check_values()

    def check_given_points(self, view: View, seed: int, data: st.DataObject) -> None:
        vector = random(view.stored.dense.shape[1], seed=seed)
        points = [view.stored.parts(vector, rank) for rank in range(self.ranks.num_ranks)]
        expected = view.stored.joined(points)
        assert torch.equal(self.joined(view, points), expected)
        distances = (view.dense - expected).norm(dim=1)
        tolerance = 1e-12 * (view.sizes + expected.norm())
        assert near(self.asked(WorkerMatrix.distances, view, points), distances, tolerance)
        self.check_nearest(view, points, distances, tolerance, data)

    def check_length(self, view: View, seed: int) -> None:
        first, second = affine(2, len(view.weights), seed)
        direction = first - second
        squared = (direction @ view.dense).square().sum()
        found = self.asked(lambda matrix: matrix.length(direction), view)
        # Inner products may be of float32, six digits of which are right.
        assert near(found.square(), squared, 1e-6 * (direction.abs() @ view.sizes).square())

    def check_nearest(
        self, view: View, points: list[Any], expected: Tensor, tolerance: Tensor, data: st.DataObject
    ) -> None:
        count = data.draw(st.integers(1, len(view.weights)))
        chosen = self.asked(lambda matrix, point: matrix.nearest(point, count), view, points).tolist()
        assert_order(chosen, expected, tolerance)
        if torch.equal(view.weights, torch.eye(len(view.weights), dtype=torch.float64)):
            assert_copies_are_in_order(chosen, view.dense)


def bounded(view: View) -> View:
    """Leave out what would overflow float16, or has no digits left."""
    assume(view.terms.max() < 1e4 if view.terms.numel() else True)
    assume(view.weights.abs().sum(1).max() < 50)
    return view


def near(found: Tensor, expected: Tensor, tolerance: Tensor) -> bool:
    return found.dtype == torch.float64 and bool(((found - expected).abs() <= tolerance + 1e-30).all())


def assert_values(view: View, found: Tensor, expected: Tensor, rounding: Tensor) -> None:
    """Check coordinates that were computed in one dtype and are kept in another."""
    kept = view.stored.of_columns(lambda dtype: torch.finfo(dtype).eps) * expected.abs()
    least = view.stored.of_columns(lambda dtype: torch.finfo(dtype).smallest_normal * torch.finfo(dtype).eps)
    assert ((found - expected).abs() <= rounding + kept + least).all()


def replace_columns(view: View, columns: list[int], values: Tensor) -> Tensor:
    """Return a [d] vector of some columns' values, 0 in the others."""
    whole = torch.zeros(view.stored.dense.shape[1], dtype=torch.float64)
    whole[columns] = values
    return whole


def pairwise_squared_distances(view: View) -> tuple[Tensor, Tensor]:
    """Return ||x_i - x_j||^2, [m, m], and what a distance may be off that is next to nothing beside the lengths."""
    differences = view.dense[:, None] - view.dense
    return differences.square().sum(2), 1e-12 * (view.sizes[:, None] + view.sizes).square()


def squared_distances_from(view: View, center: View) -> tuple[Tensor, Tensor]:
    """Return the same of one point."""
    return (view.dense - center.dense).square().sum(1), 1e-12 * (view.sizes + center.sizes).square()


TestMachine = Machine.TestCase
TestMachine.settings = settings(max_examples=25, stateful_step_count=12)
