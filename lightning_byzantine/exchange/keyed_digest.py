"""A fast digest of large tensors, of which nobody can prepare two with the same one before the key is known."""

from collections.abc import Iterable, Sequence
from hashlib import sha256, shake_256

import torch
from torch import Tensor

__all__ = ["digest_of", "keyed_digest"]

# One key for each of the words of a chunk; as many chunks as fit the cache twice over as int64.
_WIDTH = 1 << 14
_CHUNKS = {"cpu": 8, "cuda": 1024}
# Independent sets of keys.
_SETS = 2


def keyed_digest(tensors: Sequence[Tensor], key: bytes) -> bytes:
    """Return 32 bytes that depend on every bit of the tensors, and differ for different values whatever these are.

    ::

        s_c = sum_i k_i x_ci  mod 2^64          x_ci: the i-th of the 2^14 words of 32 bits in chunk c
        SHA-256 of all s_c, for two independent sets of keys k_i

    For values that were fixed before the key was drawn at random, s_c is the same for two different chunks with a
    probability of at most 2^-31 for each set, so that two sets are fooled once in 2^62 times.

    Args:
        tensors: contiguous, of any dtypes, on one device.
        key: random bytes.

    Source: Lemire & Kaser, "Strongly universal string hashing is fast", The Computer Journal 57 (2014).

    Example:
        >>> values = torch.arange(3.0)
        >>> keyed_digest([values], b"key") == keyed_digest([values.clone()], b"key")
        True
        >>> keyed_digest([values], b"key") == keyed_digest([values + 1], b"key")
        False

    """
    sums = sha256()
    keys: list[Tensor] = []
    for tensor in tensors:
        keys = keys or [words.to(tensor.device) for words in _keys(key)]
        sums.update(f"{tensor.dtype} {tuple(tensor.shape)}\n".encode())
        sums.update(_sums(_as_bytes(tensor), keys).cpu().numpy().data)
    return sums.digest()


def digest_of(tensors: Iterable[Tensor]) -> bytes:
    """Return the SHA-256 of the tensors' bytes, 32 bytes; slower, but needs no key.

    Args:
        tensors: contiguous, of any dtypes.

    Example:
        >>> digest_of([torch.zeros(2)]) == digest_of([-torch.zeros(2)])
        False

    """
    digest = sha256()
    for tensor in tensors:
        digest.update(f"{tensor.dtype} {tuple(tensor.shape)}\n".encode())
        digest.update(_as_bytes(tensor).cpu().numpy().data)
    return digest.digest()


def _as_bytes(tensor: Tensor) -> Tensor:
    return tensor.detach().reshape(-1).view(torch.uint8)


def _keys(key: bytes) -> list[Tensor]:
    """Return the keys k_i of each set, [2^14] int64."""
    stream = shake_256(key).digest(8 * _SETS * _WIDTH)
    return list(torch.frombuffer(bytearray(stream), dtype=torch.int64).view(_SETS, _WIDTH))


def _sums(content: Tensor, keys: list[Tensor]) -> Tensor:
    """Return s_c for all chunks and sets, [c, sets] int64."""
    if content.storage_offset() % 4:
        content = content.clone()  # a view as words needs aligned memory
    size = 4 * _WIDTH
    rest = content.numel() % size
    whole = content[: content.numel() - rest]
    parts = [whole] if whole.numel() else []
    if rest:
        parts.append(torch.nn.functional.pad(content[whole.numel() :], (0, size - rest)))
    return torch.cat([_sums_of_chunks(part.view(torch.int32).view(-1, _WIDTH), keys) for part in parts] or [content])


def _sums_of_chunks(words: Tensor, keys: list[Tensor]) -> Tensor:
    at_once = _CHUNKS.get(words.device.type, 1)
    wide = words.new_empty(min(at_once, len(words)), _WIDTH, dtype=torch.int64)
    products = torch.empty_like(wide)
    sums = words.new_empty(len(words), len(keys), dtype=torch.int64)
    for start in range(0, len(words), at_once):
        chunk = words[start : start + at_once]
        values, result = wide[: len(chunk)], products[: len(chunk)]
        values.copy_(chunk)
        for number, key in enumerate(keys):
            torch.mul(values, key, out=result)
            sums[start : start + at_once, number] = result.sum(1)
    return sums
