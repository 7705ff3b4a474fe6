"""Sketches, against a sum over all columns; and the inner products that follow from them."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from lightning_byzantine.matrix.sketch import PERIOD, WIDTH, fold, sketches_of


def folded(vectors: Tensor, first: int = 0, period: int = PERIOD) -> Tensor:
    out = vectors.new_zeros(len(vectors), period)
    fold(vectors, first, out)
    return out


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@given(
    first=st.sampled_from([0, 3, 16, 21, 10**12 + 5]),
    sizes=st.lists(st.sampled_from([0, 1, 5, 16, 17, 70]), min_size=1, max_size=4),
)
def test_a_column_counts_by_its_place_however_columns_are_cut(first: int, sizes: list[int]) -> None:
    vectors, cut = random(2, sum(sizes)), torch.zeros(2, 16, dtype=torch.float64)
    expected = torch.zeros_like(cut)
    for column in range(sum(sizes)):
        place = first + column
        sign = folded(torch.ones(1, 1), place, period=16).sum()
        assert sign.abs() == 1
        expected[:, place % 16] += sign * vectors[:, column]
    starts = [first + sum(sizes[:index]) for index in range(len(sizes))]
    for part, start in zip(vectors.split(sizes, dim=1), starts, strict=True):
        fold(part, start, cut)
    torch.testing.assert_close(cut, expected, rtol=1e-12, atol=1e-12)


def test_short_vectors_lose_nothing() -> None:
    vectors = random(4, WIDTH)
    sketches = sketches_of(folded(vectors, first=77))
    assert sketches.shape == (4, WIDTH)
    torch.testing.assert_close(sketches @ sketches.T, vectors @ vectors.T)


KINDS = {
    "noise": lambda vectors: vectors,
    "200 equal neighbours": lambda vectors: vectors[:, :600].repeat_interleave(200, dim=1),
    "1000 equal neighbours": lambda vectors: vectors[:, :120].repeat_interleave(1000, dim=1),
    "one layer": lambda vectors: torch.cat([vectors[:, :3000], torch.zeros_like(vectors[:, 3000:])], dim=1),
    # As gradients of a linear layer.
    "an outer product": lambda vectors: (vectors[:, :300, None] * vectors[:1, None, 300:700]).flatten(1),
    "an outer product of 4096": lambda vectors: (vectors[:, :29, None] * vectors[:1, None, 300:4396]).flatten(1),
}


@pytest.mark.parametrize("kind", KINDS)
def test_products_are_right_on_average_and_nearly_so_each_time(kind: str) -> None:
    vectors = random(2, 120_000)
    vectors[1] += 0.5 * vectors[0]
    vectors = KINDS[kind](vectors)
    product, size = vectors[0] @ vectors[1], vectors[0].norm() * vectors[1].norm()
    # Elsewhere, the same columns have other signs.
    found = torch.stack([sketches_of(folded(vectors, place)) for place in range(0, 200 * 200_000, 200_000)])
    errors = ((found[:, 0] * found[:, 1]).sum(1) - product) / size
    # Where columns a period apart are the same vector, there are eight sets of signs.
    deviation = (2 / 8) ** 0.5 if kind == "an outer product of 4096" else (2 / WIDTH) ** 0.5
    assert errors.mean().abs() < 4 * deviation / 200**0.5
    assert errors.square().mean().sqrt() < 2 * deviation


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_dtypes_stay(dtype: torch.dtype) -> None:
    vectors = random(3, 50_000)
    near = {"rtol": 1e-4, "atol": 1e-3, "check_dtype": False}
    torch.testing.assert_close(folded(vectors.to(dtype), 77), folded(vectors, 77), **near)
    assert sketches_of(folded(vectors.to(dtype))).dtype == dtype
