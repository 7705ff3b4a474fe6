"""Memory that an exchange reuses in every step."""

from torch import Tensor

__all__ = ["KeptMemory"]


class KeptMemory:
    """One [rows, columns] tensor for each block, reallocated only if its shape or dtype changes."""

    def __init__(self) -> None:
        self._buffers: dict[int, Tensor] = {}

    def get(self, index: int, like: Tensor, rows: int, columns: int) -> Tensor:
        """Return the tensor of a block with its old contents, or a new one if its shape or dtype has changed."""
        buffer = self._buffers.get(index)
        if buffer is None or buffer.shape != (rows, columns) or buffer.dtype != like.dtype:
            buffer = like.new_empty(rows, columns)
            self._buffers[index] = buffer
        return buffer

    def truncate(self, count: int) -> None:
        """Free all but the first blocks: DDP may have rebuilt its buckets, so that there are fewer."""
        self._buffers = {index: buffer for index, buffer in self._buffers.items() if index < count}

    def first(self, index: int, length: int) -> Tensor:
        """Return the first elements of a block, flat."""
        return self._buffers[index].view(-1)[:length]
