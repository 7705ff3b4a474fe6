from collections.abc import Callable
from hashlib import sha256, shake_256

import pytest
import torch
from torch import Tensor

from lightning_byzantine.exchange.keyed_digest import digest_of, keyed_digest

WIDTH, KEY = 1 << 11, b"key"


def by_hand(tensors: list[Tensor]) -> bytes:
    stream = shake_256(KEY).digest(16 * WIDTH)
    keys = [int.from_bytes(stream[8 * i : 8 * i + 8], "little") for i in range(2 * WIDTH)]
    digest = sha256()
    for tensor in tensors:
        content = tensor.reshape(-1).view(torch.uint8).numpy().tobytes()
        content += bytes(-len(content) % (8 * WIDTH) if content else 8 * WIDTH)
        padded = content + bytes(4)
        words, later = (
            [
                int.from_bytes(padded[i + start : i + start + 8], "little", signed=True)
                for i in range(0, len(content), 8)
            ]
            for start in (0, 4)
        )
        digest.update(f"{tensor.dtype} {tuple(tensor.shape)}\n".encode())
        for start in range(0, len(words), WIDTH):
            both = words[start : start + WIDTH] + later[start : start + WIDTH]
            total = sum(key * word for key, word in zip(keys, both, strict=True))
            digest.update((total % (1 << 64)).to_bytes(8, "little"))
    return digest.digest()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("length", [0, 1, 7, 4 * WIDTH, 4 * WIDTH + 1, 6 * WIDTH + 5])
def test_follows_the_formula(dtype: torch.dtype, length: int) -> None:
    values = torch.randn(length, generator=torch.Generator().manual_seed(0)).to(dtype)
    assert keyed_digest([values], KEY) == by_hand([values])
    odd = torch.cat([values[:1], values])[1:] if length else values  # in memory that is not aligned
    assert keyed_digest([odd, values], KEY) == by_hand([values, values])


@pytest.mark.parametrize(
    "digest", [lambda tensors: keyed_digest(tensors, KEY), digest_of], ids=["keyed", "without key"]
)
def test_every_bit_counts(digest: Callable[[list[Tensor]], bytes]) -> None:
    values = torch.randn(2 * WIDTH + 3, generator=torch.Generator().manual_seed(0))
    seen = {digest([values])}
    for place in (0, 5, WIDTH - 1, WIDTH, 2 * WIDTH + 2):
        for bit in (0, 1, 22, 30, 31):
            other = values.clone()
            other.view(torch.int32)[place] ^= 1 << bit if bit < 31 else -(1 << 31)
            seen.add(digest([other]))
    # In two words, where what the sums gain from their highest bits is the same or cancels out.
    other = values.clone()
    other[[1, 3]] *= -1
    seen.add(digest([other]))
    seen.add(digest([values.roll(WIDTH)]))
    seen.add(digest([values[:-1]]))
    seen.add(digest([values[:10], values[10:]]))
    seen.add(digest([values.view(torch.int32)]))
    assert len(seen) == 1 + 25 + 5
    assert digest([values.clone()]) in seen
