"""Every rule once more, from its formula, in float64 loops over Python lists of NumPy rows."""

from collections.abc import Callable

import numpy as np

Rows = list[np.ndarray]
Oracle = Callable[[Rows, int], np.ndarray]


def mean(rows: Rows, f: int) -> np.ndarray:
    total = np.zeros_like(rows[0])
    for row in rows:
        total = total + row
    return total / len(rows)


def coordinate_wise_median(rows: Rows, f: int) -> np.ndarray:
    result = []
    for values in zip(*rows, strict=True):
        ordered = sorted(values)
        low, high = ordered[(len(rows) - 1) // 2], ordered[len(rows) // 2]
        result.append((low + high) / 2)
    return np.array(result)


def coordinate_wise_trimmed_mean(rows: Rows, f: int) -> np.ndarray:
    return np.array([np.mean(sorted(values)[f : len(rows) - f]) for values in zip(*rows, strict=True)])


def geometric_median(rows: Rows, f: int) -> np.ndarray:
    """Subgradient-checked Weiszfeld: from every row and the mean, keep the best point seen."""

    def cost(point: np.ndarray) -> float:
        return sum(np.linalg.norm(row - point) for row in rows)

    best = min([*rows, mean(rows, f)], key=cost)
    scale = max(np.linalg.norm(row - best) for row in rows)
    point = mean(rows, f) if scale == 0 else mean(rows, f) + 1e-9 * (coordinate_wise_median(rows, f) - mean(rows, f))
    for _ in range(5000):
        distances = [max(np.linalg.norm(row - point), 1e-12 * scale) for row in rows]
        if scale == 0:
            break
        point = sum(row / d for row, d in zip(rows, distances, strict=True)) / sum(1 / d for d in distances)
    return min(best, point, key=cost)


def rfa(rows: Rows, f: int) -> np.ndarray:
    """Three smoothed iterations from 0, as ByzFL and the paper's public code have it."""
    point = np.zeros_like(rows[0])
    for _ in range(3):
        weights = [1 / max(0.1, np.linalg.norm(row - point)) for row in rows]
        point = sum(w * row for w, row in zip(weights, rows, strict=True)) / sum(weights)
    return point


def krum_scores(rows: Rows, f: int) -> list[float]:
    scores = []
    for i, row in enumerate(rows):
        others = sorted(float(np.sum((row - other) ** 2)) for j, other in enumerate(rows) if j != i)
        scores.append(sum(others[: len(rows) - f - 1]))
    return scores


def krum(rows: Rows, f: int) -> np.ndarray:
    return rows[int(np.argmin(krum_scores(rows, f)))]


def multi_krum(rows: Rows, f: int) -> np.ndarray:
    return mean([rows[i] for i in np.argsort(krum_scores(rows, f), kind="stable")[: len(rows) - f]], f)


def nearest(rows: Rows, center: np.ndarray, count: int) -> Rows:
    order = sorted(range(len(rows)), key=lambda i: (float(np.sum((rows[i] - center) ** 2)), i))
    return [rows[i] for i in order[:count]]


def ctma(base: Oracle) -> Oracle:
    return lambda rows, f: mean(nearest(rows, base(rows, f), len(rows) - f), f)


def nnm(base: Oracle) -> Oracle:
    return lambda rows, f: base([mean(nearest(rows, row, len(rows) - f), f) for row in rows], f)
