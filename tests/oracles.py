"""The rules' formulas once more, in float64 loops over Python lists of NumPy rows: those that several tests use."""

from collections.abc import Callable, Sequence
from itertools import combinations

import numpy as np

from lightning_byzantine.estimators.estimator import Scale

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
    """Return the row at which Vardi & Zhang's condition holds, or else descend by steps of Newton and Weiszfeld."""
    best = rows[0]
    for row in rows:
        if sum(change_of_norm(best - other, row - best) for other in rows) < 0:
            best = row
    others = [row for row in rows if (row != best).any()]
    if not others:
        return best
    toward = [(row - best) / np.linalg.norm(row - best) for row in others]
    if all(abs(direction @ toward[0]) > 1 - 1e-13 for direction in toward):  # on a line
        ordered = sorted(rows, key=lambda row: float((row - best) @ toward[0]))
        return (ordered[(len(rows) - 1) // 2] + ordered[len(rows) // 2]) / 2
    pull, copies = sum(toward), len(rows) - len(others)
    if np.linalg.norm(pull) <= copies:
        return best
    # Leave the row far enough for the Hessian to be known.
    least = (1 - copies / np.linalg.norm(pull)) / sum(1 / np.linalg.norm(row - best) for row in others) * pull
    steps = [2**k * least for k in range(40)]
    changes = [sum(change_of_norm(best - row, step) for row in rows) for step in steps]
    point = best + steps[int(np.argmin(changes))]
    for _ in range(200):
        differences = [point - row for row in rows]
        distances = [np.linalg.norm(difference) for difference in differences]
        units = [difference / distance for difference, distance in zip(differences, distances, strict=True)]
        curvature = sum(1 / distance for distance in distances)
        hessian = curvature * np.eye(len(point))
        for unit, distance in zip(units, distances, strict=True):
            hessian -= np.outer(unit, unit) / distance
        directions = -np.linalg.solve(hessian, sum(units)), -sum(units) / curvature
        steps = [length * direction for direction in directions for length in (1, 0.5, 0.1, 0.01, 1e-3, 1e-4)]
        changes = [sum(change_of_norm(difference, step) for difference in differences) for step in steps]
        step = steps[int(np.argmin(changes))]
        if min(changes) >= 0 or np.linalg.norm(step) <= 1e-12 * np.median(distances):
            break
        point = point + step
    return point


def change_of_norm(vector: np.ndarray, step: np.ndarray) -> float:
    """Return ||vector + step|| - ||vector||, without the difference of large numbers."""
    lengths = float(np.linalg.norm(vector + step) + np.linalg.norm(vector))
    return float(step @ (2 * vector + step)) / lengths if lengths > 0 else 0.0


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
    # To ten digits, so that the rounding of means, such as 1 / 3, breaks no tie.
    squared = [float(f"{np.sum((row - center) ** 2):.9e}") for row in rows]
    order = sorted(range(len(rows)), key=lambda i: (squared[i], i))
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


def limited(
    aggregates: Rows,
    scales: Sequence[Scale | None],
    beta: float,
    steps_before: int = 0,
    sent: Sequence[Rows] | None = None,
) -> tuple[Rows, Rows, list[float]]:
    """Undo momentum; return what the optimizer receives, what that adds up to, and how long steps may be."""
    previous, received, momenta, bounds = np.zeros_like(aggregates[0]), [], [], []
    last = None if sent is None else np.zeros_like(sent[0])
    for step, (aggregate, scale) in enumerate(zip(aggregates, scales, strict=True)):
        t = steps_before + step + 1
        gradient, bound = (aggregate - beta * previous) / (1 - beta), np.inf
        if scale is not None:
            noise = scale.noise * ((1 + beta) / (1 - beta) / (1 - beta ** (2 * t))) ** 0.5
            bound = 1.2 * ((scale.length / (1 - beta**t)) ** 2 + noise**2) ** 0.5
            if sent is not None and last is not None:
                way = aggregate - previous
                gradients = (np.array(sent[step]) - beta * np.array(last)) / (1 - beta)
                bound = max(
                    bound, 1.2 * sorted((gradients - previous) @ way / np.linalg.norm(way))[(len(last) - 1) // 2]
                )
        # Otherwise, what was sent is not kept.
        last = sent[step] if sent is not None and scale is not None else None
        length = float(np.linalg.norm(gradient - previous))
        if length > bound:
            gradient = previous + (gradient - previous) * (bound / length)
        received.append(gradient)
        bounds.append(bound)
        previous = beta * previous + (1 - beta) * gradient
        momenta.append(previous)
    return received, momenta, bounds
