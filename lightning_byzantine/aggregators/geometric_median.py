"""The point with the least sum of distances."""

from typing import Literal

import torch
from torch import Tensor

from lightning_byzantine.aggregators.aggregator import Aggregator
from lightning_byzantine.aggregators.coordinate_wise_median import CoordinateWiseMedian
from lightning_byzantine.aggregators.median_weights import median_weights
from lightning_byzantine.matrix import Point, WorkerMatrix, nearest
from lightning_byzantine.matrix.gram import most_central_row
from lightning_byzantine.utilities.checks import check_at_least, check_integer_at_least

__all__ = ["GeometricMedian"]

# Inner products in float32 will do if they move the result by no more than this fraction of the median distance.
_ACCURACY = 1e-7
# A row nearer to the iterate than this fraction of the median distance coincides with it.
_SITS_ON = 1e-9


class GeometricMedian(Aggregator):
    """argmin_z sum_i ||x_i - z||, to 1e-7 of the rows' median distance from it.

    The iterate is kept as weights of the rows, so that all iterations together cost one Gram matrix and one
    combination: see :func:`~lightning_byzantine.aggregators.median_weights.median_weights`. An even number of rows on
    one line have many medians: the result is the middle of them, as for numbers. Of rows that are within 1e-4 of their
    distances from one line, fewer digits are known.

    With ``tolerance=0`` or with ``smoothing``, the result is that of Weiszfeld's iteration z <- sum_i x_i / d_i /
    sum_i 1 / d_i, d_i = ||x_i - z||. An iterate that coincides with a row leaves it by the step of Vardi & Zhang.

    Args:
        max_iterations: maximum number of iterations, of which it takes ten or fewer to converge without smoothing.
        tolerance: stop when an iteration moves by less than this fraction of the median distance to the rows, which is
            robust to outliers. 0 for exactly ``max_iterations`` of Weiszfeld's iterations.
        smoothing: d_i is replaced by max(smoothing, d_i), in the units of the rows. 0 for the exact median.
        init: where Weiszfeld's iteration starts: "medoid" (the row with the least sum of distances to all others),
            "median" (coordinate-wise, one more pass), "mean" or "zero". The exact median does not depend on it.

    ``GeometricMedian(max_iterations=3, tolerance=0, smoothing=0.1, init="zero")`` is the unconverged form of the
    paper's public code ("rfa") and of ByzFL.

    Source: Weiszfeld, Tohoku Math. J. 43 (1937); Vardi & Zhang, "The multivariate L1-median and associated data
    depth", PNAS 97 (2000); Pillutla et al., "Robust Aggregation for Federated Learning", IEEE TSP 70 (2022).

    Example:
        >>> GeometricMedian()(torch.tensor([[0.0, 0.0], [1.0, 0.0], [0.0, 1.0], [1.0, 1.0]]), num_byzantine=1)
        tensor([0.5000, 0.5000])

    """

    uses_products = True

    def __init__(
        self,
        max_iterations: int = 1000,
        tolerance: float = 1e-8,
        smoothing: float = 0.0,
        init: Literal["medoid", "median", "mean", "zero"] = "medoid",
    ) -> None:
        super().__init__()
        self.max_iterations = check_integer_at_least("max_iterations", max_iterations, 1)
        self.tolerance = check_at_least("tolerance", tolerance, 0)
        self.smoothing = check_at_least("smoothing", smoothing, 0)
        if init not in ("medoid", "median", "mean", "zero"):
            raise ValueError(f"init must be 'medoid', 'median', 'mean' or 'zero', got {init!r}")
        self.init = init

    def locate(self, matrix: WorkerMatrix, num_byzantine: int) -> Point:
        """Return the geometric median as weights of the rows."""
        if self.tolerance == 0 or self.smoothing > 0:
            return matrix.combine(self._weiszfeld(matrix))
        amid = most_central_row(matrix.squared_distances())
        gram = matrix.products_about(amid)
        squared, errors = gram.squared_norms()
        if errors.median() > _ACCURACY * squared.median():
            gram = matrix.products_about(amid, exact=True)
        weights, error = median_weights(gram, self.max_iterations, self.tolerance)
        if error > _ACCURACY:
            exact = matrix.products_about(amid, exact=True)
            if not torch.equal(exact.products, gram.products):
                weights, _ = median_weights(exact, self.max_iterations, self.tolerance)
        return matrix.combine(weights)

    def _weiszfeld(self, matrix: WorkerMatrix) -> Tensor:
        weights: Tensor | None = None
        distances = self._initial_distances(matrix)
        for _ in range(self.max_iterations):
            previous, weights = weights, self._next_weights(matrix, weights, distances)
            if previous is not None and matrix.length(weights - previous) <= self.tolerance * distances.median():
                break
            distances = matrix.distances(matrix.combine(weights))
        assert weights is not None  # max_iterations is at least 1
        return weights

    def _initial_distances(self, matrix: WorkerMatrix) -> Tensor:
        if self.init == "zero":
            return matrix.squared_norms().sqrt()
        if self.init == "medoid":
            distances = matrix.squared_distances().sqrt()
            # Several rows can have the same sum, such as the middle two on a line: rounding must not choose.
            return distances[nearest(distances.sum(1), 1)[0]]
        if self.init == "median":
            return matrix.distances(CoordinateWiseMedian().locate(matrix, 0))
        return matrix.distances(matrix.mean())

    def _next_weights(self, matrix: WorkerMatrix, weights: Tensor | None, distances: Tensor) -> Tensor:
        met = (distances <= _SITS_ON * distances.median()) & (self.smoothing == 0)
        sits_on = met.double() / met.sum().clamp(min=1)
        if met.all():
            return sits_on
        inverse = torch.where(met, 0.0, 1 / distances.clamp(min=self.smoothing))
        toward_others = inverse / inverse.sum()
        if not met.any():
            return toward_others
        here = sits_on if weights is None else weights
        pull = float(inverse.sum() * matrix.length(toward_others - here))
        stay = min(1.0, float(met.sum()) / max(pull, torch.finfo(torch.float64).tiny))
        return (1 - stay) * toward_others + stay * here
