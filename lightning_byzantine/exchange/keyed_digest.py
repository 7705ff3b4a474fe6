"""A fast digest of large tensors, of which nobody can prepare two with the same one before the key is known."""

from collections.abc import Iterable, Sequence
from hashlib import sha256, shake_256

import torch
from torch import Tensor, nn

__all__ = ["digest_of", "keyed_digest"]

# One key for each of the words of a chunk; as many chunks at once as fit the cache as int64.
_WIDTH = 1 << 14
_CHUNKS = {"cpu": 16, "cuda": 256}


def keyed_digest(tensors: Sequence[Tensor], key: bytes) -> bytes:
    """Return 32 bytes that depend on every bit of the tensors, and differ for different values whatever these are.

    ::

        s_c = sum_i k_i x_ci  mod 2^64          x_ci: the i-th of the 2^14 words of 32 bits in chunk c
        SHA-256 of all s_c

    For values that were fixed before the keys k_i were drawn at random, s_c is the same for two different chunks with a
    probability of at most 2^-33: two words that differ do so by less than 2^32, which has no more than 31 factors of 2.
    That is enough where each try that fails gives away who has made it.

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
    words = _words(key)
    for tensor in tensors:
        words = words.to(tensor.device)
        sums.update(f"{tensor.dtype} {tuple(tensor.shape)}\n".encode())
        sums.update(_sums(_as_bytes(tensor), words).cpu().numpy().data)
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


def _words(key: bytes) -> Tensor:
    """Return the keys k_i, [2^14] int64."""
    return torch.frombuffer(bytearray(shake_256(key).digest(8 * _WIDTH)), dtype=torch.int64)


def _sums(content: Tensor, keys: Tensor) -> Tensor:
    """Return s_c for all chunks, [c] int64; the last one is filled up with zeros."""
    if content.storage_offset() % 4:
        content = content.clone()  # a view as words needs aligned memory
    length = content.numel() - content.numel() % (4 * _WIDTH)
    whole, rest = content[:length], content[length:]
    sums = [_sums_of_chunks(whole, keys)]
    if rest.numel():
        sums.append(_sums_of_chunks(nn.functional.pad(rest, (0, 4 * _WIDTH - rest.numel())), keys))
    return torch.cat(sums)


def _sums_of_chunks(content: Tensor, keys: Tensor) -> Tensor:
    chunks = content.view(torch.int32).view(-1, _WIDTH)
    at_once = _CHUNKS.get(content.device.type, 1)
    memory = chunks.new_empty(min(at_once, len(chunks)), _WIDTH, dtype=torch.int64)
    sums = chunks.new_empty(len(chunks), dtype=torch.int64)
    for start in range(0, len(chunks), at_once):
        some = chunks[start : start + at_once]
        products = memory[: len(some)].copy_(some).mul_(keys)
        torch.sum(products, 1, out=sums[start : start + at_once])
    return sums
