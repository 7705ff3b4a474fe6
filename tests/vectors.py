"""Rows to attack."""

import numpy as np
import torch
from torch import Tensor


def rows(m: int = 7, d: int = 40) -> Tensor:
    """Return what m workers would send if all were honest, [m, d]."""
    return torch.randn(m, d, generator=torch.Generator().manual_seed(2))


def honest_rows(vectors: Tensor, byzantine: list[int]) -> list[np.ndarray]:
    """Return the rows of the others, for oracles."""
    return [row for index, row in enumerate(vectors.double().numpy()) if index not in byzantine]
