"""Rows to aggregate and to attack."""

import numpy as np
import torch
from torch import Tensor


def workers(m: int, d: int, seed: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """Return rows about 1, [m, d], the first (m - 1) // 2 of them three times as large."""
    generator = torch.Generator().manual_seed(seed)
    rows = 1 + torch.randn(m, d, generator=generator, dtype=torch.float64)
    rows[: (m - 1) // 2] *= 3
    return rows.to(dtype)


def relative_error(actual: Tensor, expected: np.ndarray, rows: Tensor) -> float:
    """Return how far a result is from the expected one, in units of the rows' median norm."""
    scale = max(float(rows.double().norm(dim=1).median()), 1e-300)
    return float(np.linalg.norm(actual.double().numpy() - expected)) / scale


def as_list(rows: Tensor) -> list[np.ndarray]:
    """Return rows as an oracle takes them."""
    return list(rows.double().numpy())


def rows(m: int = 7, d: int = 40) -> Tensor:
    """Return what m workers would send if all were honest, [m, d]."""
    return torch.randn(m, d, generator=torch.Generator().manual_seed(2))


def honest_rows(vectors: Tensor, byzantine: list[int]) -> list[np.ndarray]:
    """Return the rows of the others, for oracles."""
    return [row for index, row in enumerate(vectors.double().numpy()) if index not in byzantine]
