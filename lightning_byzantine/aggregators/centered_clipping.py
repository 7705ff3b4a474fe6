"""Steps of bounded length from the previous aggregate."""

import torch

from lightning_byzantine.aggregators.aggregator import Aggregator
from lightning_byzantine.matrix import Point, WorkerMatrix
from lightning_byzantine.utilities.checks import check_integer_at_least, check_positive

__all__ = ["CenteredClipping"]


class CenteredClipping(Aggregator):
    """v <- v + (1/m) sum_i (x_i - v) min(1, tau / ||x_i - v||), from the previous aggregate v, at first 0.

    In one iteration, a worker moves the result by at most tau / m, and all workers together by at most tau. Set tau to
    a few times the honest workers' distance from v. If v starts far away from them, it takes several steps to arrive.

    Args:
        tau: maximum length of the differences from v, in the units of the rows.
        num_iterations: number of iterations per call.

    This is the paper's form, and ByzFL's ``CenteredClipping(m=None, L=num_iterations, tau=tau)``, where tau defaults to
    100. ByzPy has no state: it makes ten iterations from the mean of the rows, which one attacker can move anywhere.

    Source: Karimireddy, He & Jaggi, "Learning from History for Byzantine Robust Optimization", ICML 2021.

    Example:
        >>> rule = CenteredClipping(tau=2.0)
        >>> rule(torch.tensor([[1.0], [2.0], [90.0]]), num_byzantine=1)
        tensor([1.6667])
        >>> rule(torch.tensor([[1.0], [2.0], [90.0]]), num_byzantine=1)
        tensor([2.2222])

    """

    uses_previous = True

    def __init__(self, tau: float = 10.0, num_iterations: int = 1) -> None:
        super().__init__()
        self.tau = check_positive("tau", tau)
        self.num_iterations = check_integer_at_least("num_iterations", num_iterations, 1)

    def locate(self, matrix: WorkerMatrix, num_byzantine: int) -> Point:
        """Return v after the last iteration."""
        center = matrix.previous
        for _ in range(self.num_iterations):
            distances = matrix.squared_norms().sqrt() if center is None else matrix.distances(center)
            shares = torch.where(distances > self.tau, self.tau / distances, 1.0) / matrix.num_workers
            stay = float(1 - shares.sum())
            # The rows' part, scaled: their weights sum to 1 - stay.
            moved = matrix.materialize(matrix.scale(shares).combine(torch.ones(matrix.num_workers)))
            center = moved if center is None else [part + stay * old for part, old in zip(moved, center, strict=True)]
        assert center is not None  # num_iterations is at least 1
        return center
