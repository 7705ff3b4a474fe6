"""A picture of all workers over time."""

from collections import deque
from collections.abc import Sequence

import torch
from torch import Tensor

__all__ = ["HeatMap", "heat_map"]

# Pixels of one worker's row, and the multiple of the median distance that is drawn in the deepest red.
_HEIGHT = 12
_FAR = 8.0


def heat_map(distances: Sequence[Sequence[float]], measurable: Sequence[Sequence[bool]]) -> Tensor:
    """Return a picture: workers from top to bottom, steps from left to right.

    White is the median distance; farther rows are redder and nearer ones bluer, on a logarithmic scale up to 8 times.
    Rows that could not be measured are black, unknown distances grey.

    Args:
        distances: [m] for each of the steps, as multiples of the median.
        measurable: [m] for each of the steps.

    Returns:
        [3, 12 m, steps], float32 in [0, 1].

    Example:
        >>> heat_map([[1.0, 8.0]], [[True, True]])[:, ::12, 0].tolist()
        [[1.0, 1.0], [1.0, 0.0], [1.0, 0.0]]

    """
    values = torch.tensor(distances).T
    heat = (values.clamp(min=1e-9).log2() / torch.tensor(_FAR).log2()).clamp(-1, 1)
    cold = 1 + heat.clamp(max=0)
    warm = 1 - heat.clamp(min=0)
    image = torch.stack([cold, torch.minimum(cold, warm), warm])
    image = torch.where(values.isnan(), 0.7, image)
    image = torch.where(torch.tensor(measurable).T, image, 0.0)
    return image.repeat_interleave(_HEIGHT, dim=1)


class HeatMap:
    """Keeps the last steps for :func:`heat_map`.

    Args:
        max_steps: maximum width of the picture; older steps are dropped.

    Attributes:
        new_steps: number of steps since the last picture.

    Example:
        >>> picture = HeatMap(max_steps=2)
        >>> for step in range(3):
        ...     picture.add([1.0, 8.0, 1.0], [True, True, True])
        >>> picture.new_steps, picture.draw().shape, picture.new_steps
        (3, torch.Size([3, 36, 2]), 0)

    """

    def __init__(self, max_steps: int = 1000) -> None:
        self.new_steps = 0
        self._distances: deque[list[float]] = deque(maxlen=max_steps)
        self._measurable: deque[list[bool]] = deque(maxlen=max_steps)

    def add(self, distances: list[float], measurable: list[bool]) -> None:
        """Add a step: distances as multiples of the median, and which rows could be measured, [m] each."""
        self._distances.append(distances)
        self._measurable.append(measurable)
        self.new_steps += 1

    def draw(self) -> Tensor:
        """Return the picture of the last steps, at least one; see :func:`heat_map`."""
        self.new_steps = 0
        return heat_map(list(self._distances), list(self._measurable))
