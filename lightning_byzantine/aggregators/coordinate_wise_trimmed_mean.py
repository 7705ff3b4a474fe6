"""The mean of every coordinate without its extremes."""

from functools import reduce

import torch
from torch import Tensor

from lightning_byzantine.aggregators.aggregator import Aggregator
from lightning_byzantine.matrix import WorkerMatrix
from lightning_byzantine.points import Point
from lightning_byzantine.selection import order_statistics

__all__ = ["CoordinateWiseTrimmedMean"]


class CoordinateWiseTrimmedMean(Aggregator):
    """In every coordinate, the mean of the m - 2f values left without the f smallest and the f largest.

    Source: Yin et al., "Byzantine-Robust Distributed Learning: Towards Optimal Statistical Rates", ICML 2018.

    Example:
        >>> CoordinateWiseTrimmedMean()(torch.tensor([[-90.0], [2.0], [4.0], [90.0]]), num_byzantine=1)
        tensor([3.])

    """

    def locate(self, matrix: WorkerMatrix, num_byzantine: int) -> Point:
        """Return the vector of trimmed means."""
        kept = range(num_byzantine, matrix.num_workers - num_byzantine)

        def trimmed_mean(rows: Tensor) -> Tensor:
            # Row by row, so that a coordinate's result does not depend on where its chunk was cut.
            return reduce(torch.add, order_statistics(rows, kept)) / len(kept)

        return matrix.coordinatewise(trimmed_mean)
