"""Rows whose columns belong to two layers."""

from itertools import pairwise

import numpy as np
from oracles import Oracle, Rows

from lightning_byzantine.aggregators import MetaAggregator
from lightning_byzantine.matrix import Measurement, Point, Segments, WorkerMatrix


class InTwoLayers(MetaAggregator):
    """The base on rows of any length whose columns belong to two layers, by turns: wherever columns are cut."""

    def segmented(self, matrix: WorkerMatrix) -> WorkerMatrix:
        widths = [block.shape[1] for block in matrix.blocks]
        start, columns = matrix.shard * sum(widths), []
        turn = turn_of(sum(widths))
        for width in widths:
            bounds = [start, *range(start // turn * turn + turn, start + width, turn), start + width]
            pairs = pairwise(bounds)
            columns.append(
                tuple((low // turn % 2, slice(low - start, high - start)) for low, high in pairs if low < high)
            )
            start += width
        used = tuple(sorted({layer for of_block in columns for layer, _ in of_block}))
        return matrix.with_segments(Segments(("even", "odd"), (10_000, 10_000), tuple(columns), used))

    def measure(self, matrix: WorkerMatrix, num_byzantine: int) -> Measurement:
        return self.base.measure(matrix, num_byzantine)

    def locate(self, matrix: WorkerMatrix, num_byzantine: int) -> Point:
        return self.base.locate(matrix, num_byzantine)


def turn_of(num_columns: int) -> int:
    return 2 if num_columns < 1000 else 1000


def in_two_layers(base: Oracle) -> Oracle:
    def rule(rows: Rows, f: int) -> np.ndarray:
        d = len(rows[0])
        layer_of, result = np.arange(d) // turn_of(d) % 2, np.zeros(d)
        for layer in (0, 1):
            columns = layer_of == layer
            if columns.any():
                result[columns] = base([row[columns] for row in rows], f)
        return result

    return rule
