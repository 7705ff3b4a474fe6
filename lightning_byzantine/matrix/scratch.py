"""Memory for intermediate results."""

from torch import Tensor

__all__ = ["Scratch"]


class Scratch:
    """Memory that is reused for every chunk: allocating new pages takes as long as the computation."""

    def __init__(self) -> None:
        self._memory: Tensor | None = None

    def rows(self, num_rows: int, chunk: Tensor) -> Tensor:
        """Return an uninitialized [num_rows, c] tensor for a chunk [m, c]."""
        size = num_rows * chunk.shape[1]
        if self._memory is None or self._memory.numel() < size or self._memory.dtype != chunk.dtype:
            self._memory = chunk.new_empty(size)
        return self._memory[:size].view(num_rows, chunk.shape[1])

    def like(self, chunk: Tensor) -> Tensor:
        """Return an uninitialized tensor of the chunk's shape."""
        return self.rows(chunk.shape[0], chunk)
