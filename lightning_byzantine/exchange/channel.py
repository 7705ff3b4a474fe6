"""Short messages that each rank sends to every other one directly."""

from collections.abc import Callable, Sequence

import torch
import torch.distributed as dist
from torch import Tensor

from lightning_byzantine.exchange.collectives import start_transfers

__all__ = ["Channel"]

# No other rank may fill this one's memory.
_LONGEST = 1 << 26
_LENGTH_BYTES = 8


class Channel:
    """Sends bytes between all ranks, as tensors, and never by way of a third rank, which could change them.

    Every method must be called on all ranks.

    Args:
        device: where the process group's tensors are.

    Attributes:
        rank: of this process.
        num_ranks: number of processes.

    """

    def __init__(self, device: torch.device) -> None:
        self.rank, self.num_ranks = dist.get_rank(), dist.get_world_size()
        # gloo's sends support CPU tensors only.
        self._device = torch.device("cpu") if dist.get_backend() == "gloo" else device

    def start_telling(self, message: bytes) -> Callable[[], list[bytes]]:
        """Start sending a message to all; return what waits for those of all ranks, which have the same length."""
        received = self._start_gather(_tensor(message).to(self._device))
        return lambda: [_bytes(row) for row in received()]

    def tell(self, message: bytes) -> list[bytes]:
        """Return the messages of all ranks, which have the same length."""
        return self.start_telling(message)()

    def gather(self, tensor: Tensor) -> Tensor:
        """Return every rank's flat tensor [n] on every rank, as [m, n] where it was; lengths must agree."""
        return self._start_gather(tensor.to(self._device))().to(tensor.device)

    def tell_each(self, messages: Sequence[bytes]) -> list[bytes]:
        """Send every rank its message, of any length; return those for this rank.

        Raises:
            RuntimeError: if one is longer than 64 MiB; names the rank.

        """
        sent = [_tensor(message).to(self._device) for message in messages]
        announced = torch.tensor([len(message) for message in messages], device=self._device)
        lengths = self._start_exchange(list(announced[:, None]), [_LENGTH_BYTES] * self.num_ranks)
        announcements = [int(length.view(torch.int64)) for length in lengths]
        for rank, length in enumerate(announcements):
            if not 0 <= length <= _LONGEST:
                raise RuntimeError(f"Messages between ranks have at most {_LONGEST} bytes, got {length} of rank {rank}")
        return [_bytes(row) for row in self._start_exchange(sent, announcements)]

    def transfer(self, sent: Sequence[tuple[Tensor, int]], received: Sequence[tuple[Tensor, int]]) -> None:
        """Send contiguous tensors to ranks and receive some, in the same order between each two of them."""
        on_device = [(torch.empty_like(tensor, device=self._device), rank) for tensor, rank in received]
        for wait in start_transfers([(tensor.to(self._device), rank) for tensor, rank in sent], on_device):
            wait()
        for (tensor, _), (arrived, _) in zip(received, on_device, strict=True):
            tensor.copy_(arrived)

    def _start_gather(self, own: Tensor) -> Callable[[], Tensor]:
        rows = own.new_empty(self.num_ranks, own.numel())
        others = self._others()
        waits = start_transfers([(own, rank) for rank in others], [(rows[rank], rank) for rank in reversed(others)])
        rows[self.rank] = own

        def wait() -> Tensor:
            for function in waits:
                function()
            return rows

        return wait

    def _start_exchange(self, sent: Sequence[Tensor], lengths: Sequence[int]) -> list[Tensor]:
        """Return the bytes from every rank, as many as announced; nothing is sent where there are none."""
        received = [torch.empty(length, dtype=torch.uint8, device=self._device) for length in lengths]
        others = self._others()
        waits = start_transfers(
            [(sent[rank].view(torch.uint8), rank) for rank in others if sent[rank].numel()],
            [(received[rank], rank) for rank in reversed(others) if lengths[rank]],
        )
        for wait in waits:
            wait()
        received[self.rank] = sent[self.rank].view(torch.uint8)
        return received

    def _others(self) -> list[int]:
        """Return the other ranks, the next one first, so that not all send to the same one at once."""
        return [(self.rank + distance) % self.num_ranks for distance in range(1, self.num_ranks)]


def _tensor(message: bytes) -> Tensor:
    return torch.frombuffer(bytearray(message), dtype=torch.uint8) if message else torch.empty(0, dtype=torch.uint8)


def _bytes(row: Tensor) -> bytes:
    return row.cpu().numpy().tobytes()
