"""Medians over all pairs of workers."""

import numpy as np  # comes with torchmetrics
import torch
from torch import Tensor

__all__ = ["median_of_pairs"]


def median_of_pairs(values: Tensor) -> Tensor:
    """Return the median of what is above the diagonal of symmetric matrices; the lower one of the middle two.

    Args:
        values: [.., m, m] on the CPU, without NaN, m at least 2. The diagonal is overwritten by infinity.

    Returns:
        [..]

    Example:
        >>> median_of_pairs(torch.tensor([[0.0, 1.0, 5.0], [1.0, 0.0, 3.0], [5.0, 3.0, 0.0]]))
        tensor(3.)

    """
    num_rows = values.shape[-1]
    values.diagonal(dim1=-2, dim2=-1).fill_(torch.inf)
    # Of each pair twice, which have the same lower median, but for rounding. PyTorch's takes four times as long.
    middle = num_rows * (num_rows - 1) // 2 - 1
    smaller_first = np.partition(values.flatten(-2).numpy(), middle, axis=-1)
    return torch.from_numpy(np.asarray(smaller_first[..., middle]))
