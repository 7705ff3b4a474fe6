"""The rules' formulas once more, in float64 loops over Python lists of NumPy rows: those that several tests use."""

from collections.abc import Callable
from itertools import combinations

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
        before = point
        point = sum(row / d for row, d in zip(rows, distances, strict=True)) / sum(1 / d for d in distances)
        if np.linalg.norm(point - before) <= 1e-16 * scale:
            break
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


def mean_around_median(rows: Rows, count: int) -> np.ndarray:
    """Of values as far from the median, the lower are preferred once and the higher once, and both count by half."""
    result = []
    for values, median in zip(zip(*rows, strict=True), coordinate_wise_median(rows, 0), strict=True):
        low = sorted(values, key=lambda value: (abs(value - median), value))[:count]
        high = sorted(values, key=lambda value: (abs(value - median), -value))[:count]
        result.append((np.mean(low) + np.mean(high)) / 2)
    return np.array(result)


def mea_med(rows: Rows, f: int) -> np.ndarray:
    return mean_around_median(rows, len(rows) - f)


def first_subset(rows: Rows, f: int, cost: Callable[[tuple[int, ...]], float]) -> np.ndarray:
    """Mean of the cheapest m - f rows; the first in lexicographic order on ties."""
    best, least = None, np.inf
    for subset in combinations(range(len(rows)), len(rows) - f):
        current = cost(subset)
        if best is None or current < least * (1 - 1e-9):
            best, least = subset, current
    return mean([rows[i] for i in best], f)


def minimum_diameter_averaging(rows: Rows, f: int) -> np.ndarray:
    distances = [[float(np.linalg.norm(row - other)) for other in rows] for row in rows]
    return first_subset(rows, f, lambda subset: max((distances[i][j] for i, j in combinations(subset, 2)), default=0.0))


def smea(rows: Rows, f: int) -> np.ndarray:
    def spread(subset: tuple[int, ...]) -> float:
        chosen = np.array([rows[i] for i in subset])
        return float(np.linalg.norm(chosen - chosen.mean(0), ord=2)) ** 2 / len(subset)

    return first_subset(rows, f, spread)


def monna(rows: Rows, f: int) -> np.ndarray:
    return mean(nearest(rows, rows[0], len(rows) - f), f)


def comparative_gradient_elimination(rows: Rows, f: int) -> np.ndarray:
    return mean(nearest(rows, np.zeros_like(rows[0]), len(rows) - f), f)


def caf(rows: Rows, f: int) -> np.ndarray:
    weights = [1.0] * len(rows)
    best, least = mean(rows, f), np.inf
    while sum(weights) > len(rows) - 2 * f + 1e-9:
        center = sum(w * row for w, row in zip(weights, rows, strict=True)) / sum(weights)
        covariance = sum(w * np.outer(row - center, row - center) for w, row in zip(weights, rows, strict=True))
        eigenvalues, vectors = np.linalg.eigh(covariance / sum(weights))
        if eigenvalues[-1] < least * (1 - 1e-9):
            best, least = center, eigenvalues[-1]
        scores = [float((row - center) @ vectors[:, -1]) ** 2 for row in rows]
        largest = max(score for score, w in zip(scores, weights, strict=True) if w > 0)
        if largest <= 1e-20:
            break
        weights = [
            w * (1 - score / largest) if w > 0 and score < largest * (1 - 1e-9) else 0.0
            for w, score in zip(weights, scores, strict=True)
        ]
    return best


def centered_clipping(tau: float, num_iterations: int = 1, start: np.ndarray | None = None) -> Oracle:
    def rule(rows: Rows, f: int) -> np.ndarray:
        center = np.zeros_like(rows[0]) if start is None else start
        for _ in range(num_iterations):
            center = center + mean([clip(row - center, tau) for row in rows], f)
        return center

    return rule


def clip(row: np.ndarray, max_norm: float) -> np.ndarray:
    norm = float(np.linalg.norm(row))
    return row * (max_norm / norm) if norm > max_norm else row


def clipping(base: Oracle, max_norm: float) -> Oracle:
    return lambda rows, f: base([clip(row, max_norm) for row in rows], f)


def arc(base: Oracle) -> Oracle:
    def rule(rows: Rows, f: int) -> np.ndarray:
        norms = sorted((float(np.linalg.norm(row)) for row in rows), reverse=True)
        return base([clip(row, norms[2 * f * (len(rows) - f) // len(rows)]) for row in rows], f)

    return rule


def bulyan(rows: Rows, f: int) -> np.ndarray:
    left, chosen = list(rows), []
    for _ in range(len(rows) - 2 * f):
        chosen.append(left.pop(int(np.argmin(krum_scores(left, f)))))
    return mean_around_median(chosen, len(rows) - 4 * f)
