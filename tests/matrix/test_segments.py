"""Which columns belong to which parameter, against a list that says it of each column."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lightning_byzantine.matrix import Segments

Block = tuple[tuple[str | None, ...], list[int]]


@st.composite
def modules(draw: st.DrawFn) -> tuple[dict[str, int], list[Block]]:
    """Return sizes of parameters, and blocks that have each of them once, in any order; some are of no use."""
    sizes = draw(st.lists(st.sampled_from([1, 3, 7, 60, 99, 100, 130]), min_size=1, max_size=6))
    parameters = {f"p{index}": size for index, size in enumerate(sizes)}
    left, blocks = draw(st.permutations(list(parameters))), []
    while left:
        count = draw(st.integers(1, len(left)))
        names, left = left[:count], left[count:]
        used = tuple(None if draw(st.integers(0, 3)) == 0 else name for name in names)
        blocks.append((used, [parameters[name] for name in names]))
    return parameters, blocks


def of_each_column(blocks: list[Block]) -> list[list[str | None]]:
    return [[n for name, size in zip(*block, strict=True) for n in [name] * size] for block in blocks]


def names_of(segments: Segments, widths: list[int]) -> list[list[str | None]]:
    """Return the name of each column's segment, None for columns in none; no column may be in two."""
    names: list[list[str | None]] = []
    for columns, width in zip(segments.columns, widths, strict=True):
        names.append([None] * width)
        for index, part in columns:
            assert part.start < part.stop
            for column in range(part.start, part.stop):
                assert names[-1][column] is None
                names[-1][column] = segments.names[index]
    return names


@given(module=modules(), num_ranks=st.integers(1, 4))
def test_shards_of_all_ranks_have_each_column_once(module: tuple[dict[str, int], list[Block]], num_ranks: int) -> None:
    parameters, blocks = module
    segments, expected = Segments.of_blocks(parameters, blocks), of_each_column(blocks)
    assert segments.names == tuple(parameters)
    assert segments.sizes == tuple(parameters.values())
    assert names_of(segments, [len(names) for names in expected]) == expected
    widths = [-(-len(names) // num_ranks) for names in expected]
    shards = [segments.shard(rank, widths) for rank in range(num_ranks)]
    assert all(shard.used == segments.used and shard.sizes == segments.sizes for shard in shards)
    of_ranks = [names_of(shard, widths) for shard in shards]
    for index, names in enumerate(expected):
        padding = [None] * (num_ranks * widths[index] - len(names))
        assert [name for of_rank in of_ranks for name in of_rank[index]] == names + padding


def places_of(segments: Segments, widths: list[int]) -> list[list[int | None]]:
    """Return the place of each column among all parameters' elements, None for columns in no segment."""
    places: list[list[int | None]] = []
    for block, width in enumerate(widths):
        places.append([None] * width)
        for columns, place in segments.runs(block):
            places[-1][columns] = range(place, place + columns.stop - columns.start)
    return places


@given(module=modules(), num_ranks=st.integers(1, 4))
def test_an_element_has_its_place_in_any_block_and_shard(
    module: tuple[dict[str, int], list[Block]], num_ranks: int
) -> None:
    parameters, blocks = module
    in_order = [(name, index) for name in reversed(parameters) for index in range(parameters[name])]
    place_of = {element: place for place, element in enumerate(in_order)}
    expected = [
        [None if n is None else place_of[n, index] for n, size in zip(*block, strict=True) for index in range(size)]
        for block in blocks
    ]
    segments = Segments.of_blocks(parameters, blocks)
    widths = [-(-len(places) // num_ranks) for places in expected]
    of_ranks = [places_of(segments.shard(rank, widths), widths) for rank in range(num_ranks)]
    for index, places in enumerate(expected):
        padding = [None] * (num_ranks * widths[index] - len(places))
        assert [place for of_rank in of_ranks for place in of_rank[index]] == places + padding
    part = Segments.of_blocks(parameters, blocks, starts=dict.fromkeys(parameters, 1000))
    moved = places_of(part, list(map(len, expected)))
    assert moved == [[place if place is None else place + 1000 for place in places] for places in expected]


def test_neighbours_are_one_run() -> None:
    parameters = {"a": 3, "b": 2, "c": 4}
    backwards, forwards = (
        Segments.of_blocks(parameters, [(names, [parameters[name] for name in names])])
        for names in (("c", "b", "a"), ("a", "b", "c"))
    )
    assert backwards.runs(0) == [(slice(0, 9), 0)]
    assert forwards.runs(0) == [(slice(0, 3), 6), (slice(3, 5), 4), (slice(5, 9), 0)]


@given(module=modules(), least=st.sampled_from([1, 50, 100, 10**4]), num_ranks=st.integers(1, 3))
def test_small_ones_go_with_the_one_before(
    module: tuple[dict[str, int], list[Block]], least: int, num_ranks: int
) -> None:
    parameters, blocks = module
    first_of: dict[str | None, str | None] = {None: None}
    sizes: dict[str, int] = {}
    for name, size in parameters.items():
        if sizes and (size < least or sizes[list(sizes)[-1]] < least):
            first_of[name] = list(sizes)[-1]
            sizes[list(sizes)[-1]] += size
        else:
            first_of[name] = name
            sizes[name] = size
    segments, names = Segments.of_blocks(parameters, blocks), of_each_column(blocks)
    used = {first_of[name] for of_block in names for name in of_block if name is not None}
    widths = [-(-len(of_block) // num_ranks) for of_block in names]
    for rank in range(num_ranks):
        shards = [of_block[rank * width :][:width] for of_block, width in zip(names, widths, strict=True)]
        groups = segments.shard(rank, widths).grouped(least)
        # A group that is on other ranks only is there as well, without columns.
        assert {group.name: group.size for group in groups} == {name: sizes[name] for name in sizes if name in used}
        for group in groups:
            found = [name for index, part in group.places for name in shards[index][part]]
            expected = [
                n for name in parameters if first_of[name] == group.name for s in shards for n in s if n == name
            ]
            assert found == expected  # in the order of the parameters, wherever they are


def test_groups_are_views_of_blocks() -> None:
    parameters = {"weight": 4, "bias": 2, "unused": 3, "scale": 1}
    blocks = [(("scale", None, "bias"), [1, 3, 2]), (("weight",), [4])]
    segments = Segments.of_blocks(parameters, blocks)
    values = [torch.tensor([[1.0, 0, 0, 0, 2, 3]]), torch.tensor([[4.0, 5, 6, 7]])]
    parts = [[part.tolist() for part in group.of(values)] for group in segments.grouped(least=2)]
    assert parts == [[[[4, 5, 6, 7]]], [[[2, 3]]], [[[1]]]]
    # The second rank has none of "scale", and an empty part of it.
    weight, bias, scale = segments.shard(1, [3, 2]).grouped(least=1)
    own = [values[0][:, 3:], values[1][:, 2:]]
    assert [part.tolist() for part in weight.of(own) + bias.of(own) + scale.of(own)] == [[[6, 7]], [[2, 3]], [[]]]
    weight.of(own)[0].zero_()
    assert values[1].tolist() == [[4, 5, 0, 0]]


@given(sizes=st.lists(st.integers(1, 9), min_size=1, max_size=6), data=st.data())
def test_sizes_are_counted_over_all_blocks(sizes: list[int], data: st.DataObject) -> None:
    cuts = sorted(data.draw(st.lists(st.integers(0, sum(sizes)), max_size=3)))
    widths = [stop - start for start, stop in zip([0, *cuts], [*cuts, sum(sizes)], strict=True)]
    names = [name for of_block in names_of(Segments.of_sizes(sizes, widths), widths) for name in of_block]
    assert names == [str(index) for index, size in enumerate(sizes) for _ in range(size)]


def test_sizes_must_add_up() -> None:
    with pytest.raises(ValueError, match="sizes must add up to the number of columns, 7, got 5"):
        Segments.of_sizes([2, 3], widths=[4, 3])
