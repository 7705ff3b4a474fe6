"""Memory that an exchange keeps from step to step."""

from torch import Tensor

__all__ = ["KeptMemory"]


class KeptMemory:
    """One [rows, columns] tensor for each block, made anew only where a shape or dtype has changed."""

    def __init__(self) -> None:
        self._buffers: dict[int, Tensor] = {}

    def get(self, index: int, like: Tensor, rows: int, columns: int) -> Tensor:
        """Return the tensor of that block, with the contents it had, made anew if its shape or dtype has changed."""
        buffer = self._buffers.get(index)
        if buffer is None or buffer.shape != (rows, columns) or buffer.dtype != like.dtype:
            buffer = like.new_empty(rows, columns)
            self._buffers[index] = buffer
        return buffer

    def keep(self, count: int) -> None:
        """Forget all blocks but the first: DDP may have made fewer buckets of the same parameters."""
        self._buffers = {index: buffer for index, buffer in self._buffers.items() if index < count}

    def first(self, index: int, length: int) -> Tensor:
        """Return the first elements of that block, flat."""
        return self._buffers[index].view(-1)[:length]
