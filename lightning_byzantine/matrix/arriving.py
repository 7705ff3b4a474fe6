"""Column blocks that are still being received from other ranks."""

from collections.abc import Callable, Iterator, Sequence

from torch import Tensor

__all__ = ["Arriving"]


class Arriving:
    """Blocks that are waited for one by one, each when it is first read, so that communication and work overlap.

    Args:
        memory: the blocks' memory, whether received or not.
        waits: for each block, functions that return when its values may be read, on a GPU by kernels launched from then
            on; empty for received blocks.

    Attributes:
        memory: as given, for reading shapes, dtypes and devices.

    Example:
        >>> import torch
        >>> blocks = Arriving([torch.ones(1), torch.ones(1)], [[lambda: print("first")], [lambda: print("second")]])
        >>> for block in blocks:
        ...     print(block)
        first
        tensor([1.])
        second
        tensor([1.])
        >>> blocks[0]
        tensor([1.])

    """

    def __init__(self, memory: Sequence[Tensor], waits: Sequence[Sequence[Callable[[], object]]] = ()) -> None:
        self.memory = list(memory)
        self._waits = [list(functions) for functions in waits] if waits else [[] for _ in self.memory]

    def __len__(self) -> int:
        """Return the number of blocks."""
        return len(self.memory)

    def __getitem__(self, index: int) -> Tensor:
        """Wait for a block and return it."""
        while self._waits[index]:
            self._waits[index][0]()
            self._waits[index].pop(0)  # after success only
        return self.memory[index]

    def __iter__(self) -> Iterator[Tensor]:
        """Wait for each block and yield it."""
        return (self[index] for index in range(len(self)))
