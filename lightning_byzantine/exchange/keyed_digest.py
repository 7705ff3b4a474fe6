"""A fast digest of large tensors, of which nobody can prepare two with the same one before the key is known."""

from collections.abc import Iterable, Sequence
from hashlib import sha256, shake_256

import torch
from torch import Tensor, nn

__all__ = ["digest_of", "keyed_digest"]

# Words of 64 bits in a chunk, each with two keys, and as many chunks at once as fit the cache.
_WIDTH = 1 << 13
_CHUNKS = {"cpu": 32, "cuda": 256}


def keyed_digest(tensors: Sequence[Tensor], key: bytes) -> bytes:
    """Return 32 bytes that depend on every bit of the tensors, and differ for different values whatever these are.

    ::

        s_c = sum_i k_i x_ci + l_i y_ci  mod 2^64       x_ci: the i-th of the 2^13 words of 64 bits in chunk c
        SHA-256 of all s_c                              y_ci: its upper 32 bits

    For values that were fixed before the keys k_i and l_i were drawn at random, s_c is the same for two different chunks
    with a probability of at most 2^-33: the difference of two words has no more than 31 factors of 2 if their lower 32
    bits differ, and otherwise that of their upper bits, which is less than 2^32, hasn't. That is enough where each try
    that fails gives away who has made it.

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
    keys = _keys(key)
    for tensor in tensors:
        keys = keys.to(tensor.device)
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


def _keys(key: bytes) -> Tensor:
    """Return the keys k_i and l_i, [2, 2^13] int64."""
    return torch.frombuffer(bytearray(shake_256(key).digest(16 * _WIDTH)), dtype=torch.int64).view(2, _WIDTH)


def _sums(content: Tensor, keys: Tensor) -> Tensor:
    """Return s_c for all chunks, [c] int64; the last one is filled up with zeros."""
    if content.storage_offset() % 8:
        content = content.clone()  # a view as words needs aligned memory
    length = content.numel() - content.numel() % (8 * _WIDTH)
    whole, rest = content[:length], content[length:]
    sums = [_sums_of_chunks(whole, keys)]
    if rest.numel():
        sums.append(_sums_of_chunks(nn.functional.pad(rest, (0, 8 * _WIDTH - rest.numel())), keys))
    return torch.cat(sums)


def _sums_of_chunks(content: Tensor, keys: Tensor) -> Tensor:
    chunks = content.view(torch.int64).view(-1, _WIDTH)
    at_once = _CHUNKS.get(content.device.type, 1)
    memory = chunks.new_empty(min(at_once, len(chunks)), _WIDTH)
    sums = [
        _product(words, keys[0]) + _product(torch.bitwise_right_shift(words, 32, out=memory[: len(words)]), keys[1])
        for words in chunks.split(at_once)
    ]
    return torch.cat(sums)


def _product(words: Tensor, keys: Tensor) -> Tensor:
    # Only CPUs multiply matrices of integers.
    return words.mv(keys) if words.device.type == "cpu" else (words * keys).sum(1)
