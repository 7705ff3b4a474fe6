"""A vote of all ranks on buffers, such as BatchNorm statistics."""

from collections.abc import Callable, Sequence
from itertools import groupby

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from lightning_byzantine.exchange.signature import Signature
from lightning_byzantine.exchange.torch_internals import _BufferCommHookLocation, syncs_buffers
from lightning_byzantine.exchange.votes import majority, median, outvoted

__all__ = ["RobustBuffers"]

_MEASURED = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


class RobustBuffers:
    """Replaces buffers by a vote of all ranks, where DDP would broadcast those of rank 0.

    Floating-point buffers become the median of every coordinate, others the most frequent value. All ranks have the
    same weight, so that fewer than m / 2 faulty ones can't move a value out of the range of the others. A value that
    all ranks agree on stays the same, bit for bit.

    This happens when DDP would broadcast: at the start of a forward after one that computed gradients, not during
    gradient accumulation, and never with DDP's ``broadcast_buffers=False``.

    Args:
        model: the module wrapped in DDP.
        gather: returns the flat tensors of all voters as [v, n].
        voters: returns which v ranks these are.
        notice: called with the voters whose values are not finite where the majority is, [v] bool.

    """

    def __init__(
        self,
        model: DistributedDataParallel,
        gather: Callable[[Tensor], Tensor],
        voters: Callable[[], Sequence[int]],
        notice: Callable[[Tensor], None],
    ) -> None:
        self._model = model
        self._gather = gather
        self._voters = voters
        self._notice = notice
        # What all ranks had in the last vote, so that what they send next is of the same length on all.
        self._agreed = Signature({})
        self._num_bytes = 0
        model._register_buffer_comm_hook(self, RobustBuffers.vote, _BufferCommHookLocation.PRE_FORWARD)

    def synchronize(self) -> None:
        """Vote now instead of before the next forward, for example to save the buffers in a checkpoint."""
        if syncs_buffers(self._model):
            self._model._sync_buffers()  # type: ignore[no-untyped-call]

    @torch.no_grad()
    def vote(self, buffers: dict[str, Tensor]) -> None:
        """Overwrite the buffers with the result of the vote.

        Args:
            buffers: by name, of any shapes and dtypes.

        Raises:
            ValueError: on every rank, if shapes or dtypes differ between ranks; names the buffer and the ranks.

        """
        if not buffers:
            return
        # As bytes, so that buffers of all dtypes need one collective.
        parts = [torch.view_as_real(buffer) if buffer.is_complex() else buffer for buffer in buffers.values()]
        parts.sort(key=lambda part: str(part.dtype))
        groups = [list(group) for _, group in groupby(parts, key=lambda part: part.dtype)]
        flats = [torch.cat([part.flatten() for part in group]) for group in groups]
        received = self._gather_alike(
            self._signature_of(buffers), torch.cat([flat.view(torch.uint8) for flat in flats])
        )
        sizes = [flat.numel() * flat.element_size() for flat in flats]
        for group, flat, columns in zip(groups, flats, torch.split(received, sizes, dim=1), strict=True):
            # A copy, because a view as another dtype needs aligned memory.
            reports = columns.clone(memory_format=torch.contiguous_format).view(flat.dtype)
            if flat.dtype in _MEASURED:
                voted = median(reports)
                self._notice(outvoted(reports))
            else:
                voted = majority(reports)
            for part, value in zip(group, torch.split(voted, [part.numel() for part in group]), strict=True):
                part.copy_(value.view(part.shape))

    def _signature_of(self, buffers: dict[str, Tensor]) -> Signature:
        return self._agreed if self._agreed.is_of(buffers) else Signature(buffers)

    def _gather_alike(self, own: Signature, content: Tensor) -> Tensor:
        """Return the bytes of all voters, [v, n], after a check that they are of the same buffers."""
        cut = nn.functional.pad(content, (0, self._num_bytes - content.numel()))
        received = self._gather(torch.cat([own.digest.to(content.device), cut]))
        digests, contents = torch.split(received, [own.digest.numel(), cut.numel()], dim=1)
        if bool((digests != digests[0]).any()):
            own.check_same(self._gather, content.device, self._voters)
        if torch.equal(own.digest, self._agreed.digest):
            return contents
        self._agreed, self._num_bytes = own, content.numel()
        return self._gather(content)
