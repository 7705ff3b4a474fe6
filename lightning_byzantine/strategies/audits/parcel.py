"""Tensors from one rank to all others, which do not trust it."""

from collections.abc import Collection
from hashlib import sha256
from math import prod

import torch
import torch.distributed as dist
from torch import Tensor

from lightning_byzantine.strategies.audits.sent_rows import gathered

__all__ = ["MalformedParcelError", "OtherStructureError", "receive", "send"]

# Of a header: whether there is a content, a digest of its kind in four numbers, the number of tensors, and of each its
# dtype, number of dimensions and shape.
_HEADER = 4096
_HAS_CONTENT, _CANT_BE_SENT = 1, 2
_DIGEST = 4
_DTYPES = (
    torch.bool,
    torch.uint8,
    torch.int8,
    torch.int16,
    torch.int32,
    torch.int64,
    torch.float16,
    torch.bfloat16,
    torch.float32,
    torch.float64,
    torch.complex64,
    torch.complex128,
)
# How much larger than a rank's own content it may be, and by how many bytes it always may.
_TIMES, _MORE = 16, 1 << 16


class MalformedParcelError(Exception):
    """What another rank has sent is not what an honest one sends."""


class OtherStructureError(Exception):
    """Another rank's content is of another kind, much larger, or can't be described; an honest one's may."""


def send(content: list[Tensor] | None, kind: str, device: torch.device) -> None:
    """Send tensors to all other ranks, which call :func:`receive`.

    Args:
        content: the tensors; None if there are none.
        kind: what these tensors have in common with those that ranks accept.
        device: of the process group's tensors.

    """
    header = None if content is None else _described(content, kind)
    described = torch.full((_HEADER,), _CANT_BE_SENT) if header is None else header
    _to_all(described.to(device), range(dist.get_world_size()))
    accepts = gathered(torch.tensor([0], device=device)).view(-1).tolist()
    if header is not None and content is not None:
        flat = [value.detach().contiguous().view(-1).view(torch.uint8).to(device) for value in content]
        _to_all(torch.cat(flat), [rank for rank, accepted in enumerate(accepts) if accepted == 1])


def receive(
    source: int, own: list[Tensor] | None, kind: str, fixed: Collection[int], device: torch.device
) -> list[Tensor]:
    """Return the tensors that another rank sends to all.

    Args:
        source: the rank.
        own: this rank's tensors; None if this rank can't compare, and receives nothing.
        kind: of them; those of the same kind have the same dtypes and numbers of dimensions.
        fixed: indices of the tensors whose shape is the same as well.
        device: of the process group's tensors.

    Raises:
        MalformedParcelError: if the source has sent nothing, or what does not fit.
        OtherStructureError: if it has tensors of another kind or much larger ones, or can't describe them; or if this
            rank can't either.

    """
    header = torch.empty(_HEADER, dtype=torch.int64, device=device)
    dist.recv(header, source)
    problem: Exception | None = None
    shapes: list[list[int]] = []
    try:
        shapes = _checked(header.tolist(), own, kind, fixed)
    except (MalformedParcelError, OtherStructureError) as error:
        problem = error
    gathered(torch.tensor([int(problem is None)], device=device))
    if problem is not None or own is None:
        raise problem or OtherStructureError("this rank has nothing to compare with")
    sizes = [prod(shape) * value.itemsize for shape, value in zip(shapes, own, strict=True)]
    flat = torch.empty(sum(sizes), dtype=torch.uint8, device=device)
    if len(flat) > 0:
        dist.recv(flat, source)
    parts = zip(torch.split(flat.cpu(), sizes), shapes, own, strict=True)
    return [_typed(part, value.dtype).view(shape) for part, shape, value in parts]


def _described(content: list[Tensor], kind: str) -> Tensor | None:
    numbers = [_HAS_CONTENT, *_digest(kind), len(content)]
    for value in content:
        if value.dtype not in _DTYPES:
            return None
        numbers += [_DTYPES.index(value.dtype), value.dim(), *value.shape]
    if len(numbers) > _HEADER:
        return None
    return torch.tensor(numbers + [0] * (_HEADER - len(numbers)))


def _digest(kind: str) -> list[int]:
    content = sha256(kind.encode("utf-8", "surrogatepass")).digest()
    return [int.from_bytes(content[start : start + 8], "big", signed=True) for start in range(0, 8 * _DIGEST, 8)]


def _checked(header: list[int], own: list[Tensor] | None, kind: str, fixed: Collection[int]) -> list[list[int]]:
    """Return the shapes that a header states."""
    if own is None or _described(own, kind) is None:
        raise OtherStructureError("this rank's batch can't be sent as tensors")
    if header[0] == _CANT_BE_SENT:
        raise OtherStructureError("its batch can't be sent as tensors")
    if header[0] != _HAS_CONTENT:
        raise MalformedParcelError("it has sent no batch")
    if header[1 : 1 + _DIGEST] != _digest(kind):
        raise OtherStructureError("its batch is of another kind")
    # What follows has the same kind, or so it says.
    if header[1 + _DIGEST] != len(own):
        raise MalformedParcelError(f"its batch has {header[1 + _DIGEST]} tensors, this rank's {len(own)}")
    shapes, position = [], 2 + _DIGEST
    for index, value in enumerate(own):
        dtype, dimensions = header[position : position + 2] if position + 2 <= len(header) else (-1, -1)
        shape = header[position + 2 : position + 2 + value.dim()]
        if dtype != _DTYPES.index(value.dtype) or dimensions != value.dim() or len(shape) != value.dim():
            raise MalformedParcelError(f"tensor {index} of its batch has another dtype or number of dimensions")
        if min(shape, default=0) < 0 or (index in fixed and shape != list(value.shape)):
            raise MalformedParcelError(f"tensor {index} of its batch has the shape {tuple(shape)}")
        shapes.append(shape)
        position += 2 + value.dim()
    # An empty tensor counts by its other sizes, whose product must not overflow either.
    sizes = (prod(max(size, 1) for size in shape) * value.itemsize for shape, value in zip(shapes, own, strict=True))
    if (size := sum(sizes)) > _TIMES * sum(value.nbytes for value in own) + _MORE:
        raise OtherStructureError(f"its batch has {size} bytes")
    return shapes


def _typed(content: Tensor, dtype: torch.dtype) -> Tensor:
    # Other values than 0 and 1 are not defined as truth values.
    return content.ne(0) if dtype == torch.bool else content.clone().view(dtype)


def _to_all(content: Tensor, ranks: Collection[int]) -> None:
    # Directly to each: in a broadcast, ranks forward what they could change.
    works = [dist.isend(content, rank) for rank in ranks if rank != dist.get_rank() and content.numel() > 0]
    for work in works:
        if work is not None:
            work.wait()
