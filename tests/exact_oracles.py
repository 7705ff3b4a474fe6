"""Rules that choose by distances from a coordinate-wise center, in fractions, where nothing is rounded.

As documented, distances that differ by less than 1e-9 of the larger one tie.
"""

from collections.abc import Callable, Sequence
from fractions import Fraction

Row = list[Fraction]
Oracle = Callable[[list[Row], int], Row]

TIE = Fraction(1, 10**9)


def mean(rows: Sequence[Row]) -> Row:
    return [sum(column) / len(rows) for column in zip(*rows, strict=True)]


def squared_distance(row: Row, other: Row) -> Fraction:
    return sum(((x - y) ** 2 for x, y in zip(row, other, strict=True)), start=Fraction(0))


def lowest(values: Sequence[Fraction], count: int, tie: Fraction = TIE) -> list[int]:
    """Return the indices of the lowest values; neighbours in sorted order that are tied are sorted by index."""
    order = sorted(range(len(values)), key=lambda i: values[i])
    groups: list[list[int]] = []
    for i in order:
        if groups and values[i] - values[groups[-1][-1]] <= tie * values[i]:
            groups[-1].append(i)
        else:
            groups.append([i])
    return [i for group in groups for i in sorted(group)][:count]


def nearest(rows: list[Row], center: Row, count: int) -> list[int]:
    squared = [squared_distance(row, center) for row in rows]
    return lowest(squared, count, tie=1 - (1 - TIE) ** 2)  # of distances


def coordinatewise(function: Callable[[list[Fraction], int], Fraction]) -> Oracle:
    return lambda rows, f: [function(sorted(column), f) for column in zip(*rows, strict=True)]


def median_of(ordered: list[Fraction]) -> Fraction:
    return (ordered[(len(ordered) - 1) // 2] + ordered[len(ordered) // 2]) / 2


def trimmed_mean_of(ordered: list[Fraction], f: int) -> Fraction:
    kept = ordered[f : len(ordered) - f]
    return sum(kept, start=Fraction(0)) / len(kept)


def mean_around_median_of(ordered: list[Fraction], count: int) -> Fraction:
    """Of values as far from the median, the lower are preferred once and the higher once, and both count by half."""
    median = median_of(ordered)
    total = Fraction(0)
    for sign in (1, -1):
        left = [sign * value for value in ordered]
        left.sort()
        while len(left) > count:
            down, up = sign * median - left[0], left[-1] - sign * median
            is_tied = abs(down - up) < TIE * max(down, up)
            left.pop(-1 if is_tied or up > down else 0)
        total += sign * sum(left, start=Fraction(0))
    return total / 2 / count


median = coordinatewise(lambda ordered, f: median_of(ordered))
trimmed_mean = coordinatewise(trimmed_mean_of)
mea_med = coordinatewise(lambda ordered, f: mean_around_median_of(ordered, len(ordered) - f))


def ctma(base: Oracle) -> Oracle:
    return lambda rows, f: mean([rows[i] for i in nearest(rows, base(rows, f), len(rows) - f)])


def nnm(base: Oracle) -> Oracle:
    def rule(rows: list[Row], f: int) -> Row:
        squared = [[squared_distance(row, other) for other in rows] for row in rows]
        return base([mean([rows[i] for i in lowest(each, len(rows) - f)]) for each in squared], f)

    return rule


def bulyan(rows: list[Row], f: int) -> Row:
    left, chosen = list(range(len(rows))), []
    for _ in range(len(rows) - 2 * f):
        scores = []
        for i in left:
            others = sorted(squared_distance(rows[i], rows[j]) for j in left if j != i)
            scores.append(sum(others[: len(left) - f - 1], start=Fraction(0)))
        chosen.append(left.pop(lowest(scores, 1)[0]))
    count = len(rows) - 4 * f
    return [mean_around_median_of(sorted(column), count) for column in zip(*(rows[i] for i in chosen), strict=True)]
