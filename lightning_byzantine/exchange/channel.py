"""Short messages that each rank sends to every other one directly."""

from collections.abc import Callable, Sequence

import torch
import torch.distributed as dist
from torch import Tensor

from lightning_byzantine.exchange.collectives import start_transfers

__all__ = ["Channel"]

# No other rank may fill this one's memory.
_LONGEST = 1 << 26


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
        received = self._start_exchange(_tensor(message).to(self._device).expand(self.num_ranks, -1))
        return lambda: [_bytes(row) for row in received()]

    def tell(self, message: bytes) -> list[bytes]:
        """Return the messages of all ranks, which have the same length."""
        return self.start_telling(message)()

    def gather(self, tensor: Tensor) -> Tensor:
        """Return every rank's flat tensor [n] on every rank, as [m, n] where it was; lengths must agree."""
        own = tensor.to(self._device)
        rows = own.new_empty(self.num_ranks, own.numel())
        rows[self.rank] = own
        self._transfer([own] * self.num_ranks, list(rows))
        return rows.to(tensor.device)

    def tell_each(self, messages: Sequence[bytes]) -> list[bytes]:
        """Send every rank its message, of any length; return those for this rank.

        Raises:
            RuntimeError: if one is longer than 64 MiB; names the rank.

        """
        lengths = torch.tensor([[len(message)] for message in messages], device=self._device)
        announced = self._start_exchange(lengths)()[:, 0].tolist()
        for rank, length in enumerate(announced):
            if not 0 <= length <= _LONGEST:
                raise RuntimeError(f"Messages between ranks have at most {_LONGEST} bytes, got {length} of rank {rank}")
        received = [torch.empty(length, dtype=torch.uint8, device=self._device) for length in announced]
        self._transfer([_tensor(message).to(self._device) for message in messages], received)
        return [messages[rank] if rank == self.rank else _bytes(row) for rank, row in enumerate(received)]

    def transfer(self, sent: Sequence[tuple[Tensor, int]], received: Sequence[tuple[Tensor, int]]) -> None:
        """Send contiguous tensors to ranks and receive some, in the same order between each two of them."""
        on_device = [(torch.empty_like(tensor, device=self._device), rank) for tensor, rank in received]
        for wait in start_transfers([(tensor.to(self._device), rank) for tensor, rank in sent], on_device):
            wait()
        for (tensor, _), (arrived, _) in zip(received, on_device, strict=True):
            tensor.copy_(arrived)

    def _start_exchange(self, rows: Tensor) -> Callable[[], Tensor]:
        """Start sending every rank its row of [m, n]; return what waits for those sent to this one, [m, n]."""
        # As direct as a send to each, in one call.
        sent, received = rows.contiguous(), torch.empty_like(rows, memory_format=torch.contiguous_format)
        work = dist.all_to_all_single(received, sent, async_op=True)

        def wait() -> Tensor:
            work.wait()
            return received

        return wait

    def _transfer(self, sent: Sequence[Tensor], received: Sequence[Tensor]) -> None:
        """Send every other rank its tensor, and receive theirs, except where these are empty."""
        others = self._others()
        waits = start_transfers(
            [(sent[rank], rank) for rank in others if sent[rank].numel()],
            [(received[rank], rank) for rank in reversed(others) if received[rank].numel()],
        )
        for wait in waits:
            wait()

    def _others(self) -> list[int]:
        """Return the other ranks, the next one first, so that not all send to the same one at once."""
        return [(self.rank + distance) % self.num_ranks for distance in range(1, self.num_ranks)]


def _tensor(message: bytes) -> Tensor:
    return torch.frombuffer(bytearray(message), dtype=torch.uint8) if message else torch.empty(0, dtype=torch.uint8)


def _bytes(row: Tensor) -> bytes:
    return row.cpu().numpy().tobytes()
