"""Every attack once more, from its formula, in float64 loops over Python lists of NumPy rows."""

import struct
from collections.abc import Callable

import numpy as np
from oracles import Oracle, Rows

Forge = Callable[[Rows, float], np.ndarray]

_STRUCTS = {"float16": ("<e", "<H"), "float32": ("<f", "<I"), "float64": ("<d", "<Q")}


def honest_mean(rows: Rows) -> np.ndarray:
    return np.array([sum(values) / len(rows) for values in zip(*rows, strict=True)])


def deviation(rows: Rows, ddof: int) -> np.ndarray:
    if len(rows) == 1:
        return np.zeros_like(rows[0])
    result = []
    for values, mean in zip(zip(*rows, strict=True), honest_mean(rows), strict=True):
        result.append((sum((value - mean) ** 2 for value in values) / (len(rows) - ddof)) ** 0.5)
    return np.array(result)


def a_little_is_enough(rows: Rows, z: float, ddof: int = 1) -> np.ndarray:
    return honest_mean(rows) - z * deviation(rows, ddof)


def inner_product_manipulation(rows: Rows, epsilon: float) -> np.ndarray:
    return -epsilon * honest_mean(rows)


def perturbation_of(rows: Rows, perturbation: str) -> np.ndarray:
    mean = honest_mean(rows)
    norm = np.linalg.norm(mean)
    return {
        "std": -deviation(rows, 1),
        "unit": -mean / norm if norm else 0 * mean,
        "sign": -np.sign(mean),
    }[perturbation]


def farthest_hidden(rows: Rows, perturbation: str, is_hidden: Callable[[np.ndarray], bool]) -> np.ndarray:
    """Bisect for gamma: what is forged is checked at every trial."""
    mean, direction = honest_mean(rows), perturbation_of(rows, perturbation)
    if not direction.any():
        return mean
    low, high = 0.0, 1e-6
    while is_hidden(mean + high * direction):
        low, high = high, 2 * high
    for _ in range(100):
        middle = (low + high) / 2
        low, high = (middle, high) if is_hidden(mean + middle * direction) else (low, middle)
    return mean + low * direction


def min_max(rows: Rows, perturbation: str) -> np.ndarray:
    widest = max(float(np.linalg.norm(row - other)) for row in rows for other in rows)

    def is_hidden(forged: np.ndarray) -> bool:
        return max(float(np.linalg.norm(forged - row)) for row in rows) <= widest

    return farthest_hidden(rows, perturbation, is_hidden)


def min_sum(rows: Rows, perturbation: str) -> np.ndarray:
    def spread_about(center: np.ndarray) -> float:
        return sum(float(np.linalg.norm(center - row)) ** 2 for row in rows)

    least = min(spread_about(row) for row in rows)
    return farthest_hidden(rows, perturbation, lambda forged: spread_about(forged) <= least)


def relocated_orthogonal_perturbation(
    rows: Rows,
    z: float = 1.0,
    angle: float = 270.0,
    relocation: float = 1.0,
    reference: float = 0.9,
    last: np.ndarray | None = None,
) -> np.ndarray:
    mean = honest_mean(rows)
    last = mean if last is None else last
    beside = reference * last + (1 - reference) * mean
    beside /= np.linalg.norm(beside)
    ones = np.ones(len(mean))
    orthogonal = ones - sum(beside) * beside
    orthogonal /= np.linalg.norm(orthogonal)
    direction = np.sin(np.radians(angle)) * orthogonal + np.cos(np.radians(angle)) * beside
    return relocation * last + (1 - relocation) * mean + z * honest_radius(rows) * direction


def honest_radius(rows: Rows) -> float:
    return float(np.median([np.linalg.norm(row - honest_mean(rows)) for row in rows]))


def one_layer(rows: Rows, attacked: range, budget: float) -> np.ndarray:
    """Move some columns of the mean."""
    deviations = deviation(rows, 1)
    norm = sum(float(deviations[column]) ** 2 for column in attacked) ** 0.5
    forged = honest_mean(rows)
    for column in attacked if norm else ():
        forged[column] -= budget * honest_radius(rows) * deviations[column] / norm
    return forged


def against_the_mean(rows: Rows, factor: float) -> np.ndarray:
    mean = honest_mean(rows)
    norm = float(np.linalg.norm(mean))
    return mean - factor * honest_radius(rows) * mean / norm if norm else mean


def beside_the_farthest_pair(rows: Rows, factor: float) -> np.ndarray:
    pairs = [(a, b) for a in range(len(rows)) for b in range(a, len(rows))]
    first, second = max(pairs, key=lambda pair: float(np.linalg.norm(rows[pair[0]] - rows[pair[1]])))
    return honest_mean(rows) + factor * (rows[first] - rows[second])


def best_factor(harm: Callable[[float], float], step: float, evaluations: int) -> float:
    """ByzFL's search: double the step while it helps, then shrink it to 0.8 of itself after every trial."""
    best, most, left = 0.0, harm(0.0), evaluations - 1
    while left > 0:
        left -= 1
        value = harm(best + step)
        if not value > most:
            step *= 0.8
            break
        best, most, step = best + step, value, 2 * step
    while left > 0:
        left -= 1
        value = harm(best + step)
        if value > most:
            best, most = best + step, value
        step *= 0.8
    return best


def optimal(rows: Rows, f: int, rule: Oracle, forge: Forge, step: float, evaluations: int = 20) -> np.ndarray:
    def harm(factor: float) -> float:
        return float(np.linalg.norm(rule([*rows, *[forge(rows, factor)] * f], f) - honest_mean(rows)))

    return forge(rows, best_factor(harm, step, evaluations))


def flip_bit(value: float, bit: int, dtype: str) -> float:
    """Through bytes: a number as its IEEE 754 representation, bit 0 the least significant."""
    number, integer = _STRUCTS[dtype]
    (bits,) = struct.unpack(integer, struct.pack(number, value))
    (flipped,) = struct.unpack(number, struct.pack(integer, bits ^ (1 << bit)))
    return float(flipped)
