"""A picture of all workers over time."""

from collections.abc import Sequence

import torch
from torch import Tensor

__all__ = ["heat_map"]

# Pixels of one worker's row, and a distance of this many times the median is as red as it gets.
_HEIGHT = 12
_FAR = 8.0


def heat_map(distances: Sequence[Sequence[float]], measurable: Sequence[Sequence[bool]]) -> Tensor:
    """Return a picture: workers from top to bottom, steps from left to right.

    White for the median distance, redder for farther ones and bluer for nearer ones, on a logarithmic scale up to 8
    times; black for rows that could not be measured, grey where there is nothing known.

    Args:
        distances: [m] for each of the steps, as multiples of the median.
        measurable: [m] for each.

    Returns:
        [3, 12 m, steps], in [0, 1].

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
