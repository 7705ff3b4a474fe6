"""Column blocks that are on their way from other ranks."""

from collections.abc import Callable, Iterator, Sequence

from torch import Tensor

__all__ = ["Arriving"]


class Arriving:
    """Blocks that are waited for one by one, each when somebody first reads it: work on those before it goes on.

    Args:
        memory: where the blocks' values are, or will be.
        waits: for each block, functions that return when its values may be read, on a GPU by what is launched from then
            on; none for blocks that are there.

    Attributes:
        memory: as given, for whom shapes, dtypes and devices will do.

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
        """Return how many blocks there are."""
        return len(self.memory)

    def __getitem__(self, index: int) -> Tensor:
        """Return a block as soon as its values are there."""
        while self._waits[index]:
            self._waits[index][0]()
            self._waits[index].pop(0)  # one that has failed stays
        return self.memory[index]

    def __iter__(self) -> Iterator[Tensor]:
        """Yield every block as soon as its values are there."""
        return (self[index] for index in range(len(self)))
