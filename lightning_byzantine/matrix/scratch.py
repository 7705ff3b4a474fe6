"""Memory for intermediate results."""

from torch import Tensor

__all__ = ["Scratch"]


class Scratch:
    """Memory that is reused for every chunk: allocating new pages takes as long as the computation."""

    def __init__(self) -> None:
        self._memory: Tensor | None = None

    def rows(self, num_rows: int, chunk: Tensor) -> Tensor:
        """Return an uninitialized [num_rows, c] tensor for a chunk [m, c]."""
        return self.vector(num_rows * chunk.shape[1], chunk).view(num_rows, chunk.shape[1])

    def vector(self, size: int, like: Tensor) -> Tensor:
        """Return an uninitialized [size] tensor of the dtype and device of another one."""
        if self._memory is None or self._memory.numel() < size or self._memory.dtype != like.dtype:
            self._memory = like.new_empty(size)
        return self._memory[:size]

    def like(self, chunk: Tensor) -> Tensor:
        """Return an uninitialized tensor of the chunk's shape."""
        return self.rows(chunk.shape[0], chunk)
