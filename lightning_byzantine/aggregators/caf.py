"""A filter along the directions of largest variance."""

from collections.abc import Iterator

import torch
from torch import Tensor

from lightning_byzantine.aggregators.aggregator import Aggregator
from lightning_byzantine.matrix import Point, WorkerMatrix, nearest

__all__ = ["CAF"]

# Relative differences below this are rounding, which must neither choose an eigenvector nor keep a weight above 0.
_SAME = 1e-9
# If all lambdas are this many times that of all rows, float32 is enough to know that the mean is best. The guarantee is
# that of any path that errors lead to: they turn an eigenvector only where others are about as large. Like all that
# follows from eigenvectors, it takes the same LAPACK on all ranks.
_CLEARLY = 1.01


class CAF(Aggregator):
    """Covariance bound-agnostic filter: lowers weights along the direction of largest variance, until 2f are gone.

    Starting from c = 1, repeat while sum_i c_i > m - 2f: with mu the mean weighted by c, and (lambda, v) the largest
    eigenvalue of the weighted covariance and its eigenvector, tau_i = <v, x_i - mu>^2 and
    c_i <- c_i (1 - tau_i / max_j tau_j), with the maximum over all j with c_j > 0. Returns the mu with the smallest
    lambda.

    Eigenvectors are exact, from inner products. ByzFL takes one step of the power method from a random vector and ByzPy
    three from a fixed one, with the same result for collinear rows. Their maximum includes rows of weight 0, so that
    they may never end. For f = 0, where ByzFL returns None, this is the mean.

    Source: Allouah, Guerraoui & Stephan, "Towards Trustworthy Federated Learning with Untrusted Participants", ICML
    2025, algorithm 2.

    Example:
        >>> CAF()(torch.tensor([[1.0], [2.0], [3.0], [90.0]]), num_byzantine=1)
        tensor([2.0076])

    """

    uses_products = True

    def locate(self, matrix: WorkerMatrix, num_byzantine: int) -> Point:
        """Return the weighted mean with the smallest lambda."""
        if num_byzantine == 0:
            return matrix.mean()
        path = _filtered(matrix.squared_distances(), num_byzantine)
        _, of_all = next(path)
        if all(eigenvalue > _CLEARLY * of_all for _, eigenvalue in path):
            return matrix.mean()
        best, least = torch.ones(matrix.num_workers, dtype=torch.float64), torch.inf
        for weights, eigenvalue in _filtered(matrix.exact_squared_distances(), num_byzantine):
            if eigenvalue < (1 - _SAME) * least:
                best, least = weights, eigenvalue
        return matrix.combine(best / best.sum())


def _filtered(squared: Tensor, num_byzantine: int) -> Iterator[tuple[Tensor, float]]:
    """Yield weights, [m], and their lambda, until 2f are gone or all rows that are left are the same.

    Args:
        squared: [m, m], squared distances.
        num_byzantine: f, at least 1.

    """
    num_workers = len(squared)
    weights = torch.ones(num_workers, dtype=torch.float64)
    while weights.sum() > num_workers - 2 * num_byzantine + _SAME:
        left = weights.nonzero().flatten()
        eigenvalue, projections = _widest_spread(squared[left][:, left], weights[left])
        yield weights, eigenvalue
        if eigenvalue == 0:
            break
        loss = projections / projections.max()
        weights = weights.index_copy(0, left, torch.where(loss > 1 - _SAME, 0.0, weights[left] * (1 - loss)))


def _widest_spread(squared: Tensor, weights: Tensor) -> tuple[float, Tensor]:
    """Return the largest eigenvalue of the weighted covariance, and squared projections on its vector, in any unit.

    Args:
        squared: [n, n], squared distances.
        weights: [n], positive.

    """
    unit = float(squared.max())
    if unit == 0:
        return 0.0, torch.zeros_like(weights)
    # Inner products about the weighted mean, from distances, scaled so that they can't overflow.
    parts = weights / weights.sum()
    squared = squared / unit
    means = squared @ parts
    products = -0.5 * (squared - means - means[:, None] + parts @ means)
    # X diag(c) X^T has the eigenvalues of sqrt(c) X^T X sqrt(c), and its vectors are combinations of the rows.
    roots = parts.sqrt()
    eigenvalues, vectors = torch.linalg.eigh(roots[:, None] * products * roots)
    largest = eigenvalues[-1]
    space = vectors[:, eigenvalues >= (1 - _SAME) * largest]
    # If the eigenvalue is repeated: the longest projection of a row's unit vector on its space, ties broken by index.
    seen = space.square().sum(1)
    vector = space @ space[nearest(1 - seen.clamp(max=1), 1)[0]]
    return float(largest) * unit, (products @ (roots * vector)).square()
