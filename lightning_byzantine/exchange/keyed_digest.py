"""A fast digest of large tensors, of which nobody can prepare two with the same one before the key is known."""

from collections.abc import Iterable, Sequence
from hashlib import sha256, shake_256

import torch
from torch import Tensor, nn

__all__ = ["digest_of", "keyed_digest"]

# Words of 64 bits in a chunk, bytes in it, and how many chunks an accelerator multiplies at once.
_WIDTH = 1 << 11
_CHUNK = 8 * _WIDTH
_AT_ONCE = 1024
_LATER = 4  # bytes


def keyed_digest(tensors: Sequence[Tensor], key: bytes) -> bytes:
    """Return 32 bytes that depend on every bit of the tensors, and differ for different values whatever these are.

    ::

        s_c = sum_i k_i x_ci + l_i y_ci  mod 2^64       x_ci: the i-th of the 2^11 words of 64 bits in chunk c
        SHA-256 of all s_c                              y_ci: the word that begins 32 bits later

    For values that were fixed before the keys k_i and l_i were drawn at random, s_c is the same for different chunks
    with a probability of at most 2^-33: the difference of two words has no more than 31 factors of 2 if their lower 32
    bits differ, and what are the upper 32 bits of one word are the lower ones of another. That is enough where each try
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
    """Return the keys k_i and l_i, [2, 2^11] int64."""
    return torch.frombuffer(bytearray(shake_256(key).digest(16 * _WIDTH)), dtype=torch.int64).view(2, _WIDTH)


def _sums(content: Tensor, keys: Tensor) -> Tensor:
    """Return s_c for all chunks, [c] int64; the last one is filled up with zeros."""
    # The last word of a chunk that begins later needs something behind the chunk.
    length = max(0, content.numel() - _LATER) // _CHUNK * _CHUNK
    rest = content[length:]
    num_last = max(1, -(-rest.numel() // _CHUNK))
    padded = nn.functional.pad(rest, (0, num_last * _CHUNK + _LATER - rest.numel()))
    sums = [_sums_of_chunks(padded, num_last, keys)]
    if length:
        sums.insert(0, _sums_of_chunks(content, length // _CHUNK, keys))
    return torch.cat(sums)


def _sums_of_chunks(content: Tensor, num_chunks: int, keys: Tensor) -> Tensor:
    some, later = (_words(content, start, num_chunks) for start in (0, _LATER))
    return _products(some, keys[0]) + _products(later, keys[1])


def _words(content: Tensor, start: int, num_chunks: int) -> Tensor:
    """Return the words of the chunks that begin at a byte, [num_chunks, 2^11]."""
    if content.device.type == "cpu":
        # Wherever the bytes are: a view by PyTorch would have to be a copy unless they begin at a multiple of 8.
        words = torch.frombuffer(content.numpy().data, dtype=torch.int64, count=num_chunks * _WIDTH, offset=start)
    else:
        words = content[start : start + num_chunks * _CHUNK].clone().view(torch.int64)
    return words.view(num_chunks, _WIDTH)


def _products(words: Tensor, keys: Tensor) -> Tensor:
    """Return the sum of the products with the keys for each row of words."""
    if words.device.type == "cpu":
        # Its loads need no alignment: words may begin anywhere.
        return torch.mv(words, keys)
    # Accelerators have no such product of integers, and these take as much memory as the words.
    return torch.cat([(some * keys).sum(1) for some in torch.split(words, _AT_ONCE)])
