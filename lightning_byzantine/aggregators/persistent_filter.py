"""A filter of what deviates step after step; the default rule."""

import torch
from torch import Tensor

from lightning_byzantine.aggregators.aggregator import Aggregator
from lightning_byzantine.aggregators.histories import Histories
from lightning_byzantine.aggregators.loud_directions import explaining_workers
from lightning_byzantine.aggregators.middles import distances_from, middle_weights, products_about, smallest
from lightning_byzantine.matrix import Measurement, Point, WorkerMatrix

__all__ = ["PersistentFilter"]

# Workers whose average squared deviation is over this many usual ones are left out, before any others and after them.
_VERY_FAR, _FAR = 25.0, 4.0
# Rows are clipped to this many times the distance of the (m - f)-th row.
_SLACK = 1.5


class PersistentFilter(Aggregator):
    """The mean of the workers that don't stand out over many steps, clipped; decided in each parameter tensor.

    A worker's noise points elsewhere in every step; what liars add up to does not. So deviations are averaged over
    about 50 steps, and only directions in which they remain louder than noise are looked at. If there are none, the
    result is the mean. In each tensor, with inner products A_ij = <x_i - c, x_j - c> about the geometric median c:

    1. P and Q are averages of A_ij s_i s_j / med and min(A_ii / med, 100), see
       :class:`~lightning_byzantine.aggregators.histories.Histories`, where med is the median of A_ii and s_i clips row
       i to it.
    2. The workers with the largest Q_i > 25 are left out, up to f.
    3. Of the others, those that explain loud directions are left out, up to f in all. A direction, an eigenvector p of
       P about its mean, is loud if its eigenvalue is above r t, where r is the median of the squared distances from P's
       geometric median, and::

           t = min(1.2 + 3 sqrt(m) k, max(1.5, f (m - f) / 2m))
           k = 1.4826 median_{i != j} |P_ij| / sqrt(P_ii P_jj),  P_ii at least r / 4

       t is what noise comes to, but no more than two groups half as far apart as the rows would. Workers explain it if
       |p_i - median p| is over 3 times the (n - l)-th smallest of n, where l is how many may still be left out. This
       is repeated without them until no direction is loud or f workers are left out.
    4. If fewer are, those with the largest Q_i > 4 are left out as well, up to f in all.
    5. The rows that are left are clipped to 1.5 times the (m - f)-th smallest of all rows' distances from c, and
       averaged; what is cut off moves to c. So liars who first made the others leave honest workers out gain little.

    It is CTMA with slack whose distances are measured only where liars can't hide: along directions that stay. Rows
    are not kept, so the memory is that of m x m numbers for each tensor. Tensors of fewer than 100 elements, such as
    biases, belong to the one before.

    Workers that take turns at lying in a few steps each are only clipped. Workers with data of their own kind stand out
    for good, as in any rule; under momentum of a homogeneous noise, none does.

    Sources: filters along eigenvectors are from Diakonikolas et al., "Robust Estimators in High Dimensions without the
    Computational Intractability", FOCS 2016, and Allouah et al., ICML 2025 (:class:`CAF`); evidence of many steps from
    Allen-Zhu et al., "Byzantine-Resilient Non-Convex Stochastic Gradient Descent", ICLR 2021, and Karimireddy et al.,
    ICML 2021; clipping around a robust center from the latter; the combination and its constants are this package's.

    Example:
        >>> generator = torch.Generator().manual_seed(0)
        >>> rule, means = PersistentFilter(), []
        >>> for step in range(20):
        ...     vectors = torch.randn(8, 400, generator=generator)
        ...     vectors[6:] += 0.6  # the others' deviations are longer
        ...     means.append(rule(vectors, num_byzantine=3).mean().item())
        >>> means[0] > 0.1, abs(means[-1]) < 0.03
        (True, True)

    """

    uses_products = True

    def __init__(self) -> None:
        super().__init__()
        self.histories = Histories()

    def __repr__(self) -> str:
        """Show what is called, without the part that remembers."""
        return "PersistentFilter()"

    def reset(self) -> None:
        """Forget what the workers have sent."""
        self.histories.clear()

    def measure(self, matrix: WorkerMatrix, num_byzantine: int) -> Measurement:
        """Return which rows can be used."""
        return matrix.measure(from_products=num_byzantine > 0, split=num_byzantine > 0)

    def locate(self, matrix: WorkerMatrix, num_byzantine: int) -> Point:
        """Return the mean of the rows that are left, each segment with its own weights."""
        if num_byzantine == 0 and matrix.num_workers == matrix.num_offered:
            return matrix.mean()
        parts = matrix.split()
        if num_byzantine == 0:
            # All liars have been dropped, but the step from what they did before is still limited by distances.
            return matrix.join([part.mean() for part in parts.values()])
        products = matrix.products_of_parts()
        centers = middle_weights(products, torch.ones(products.shape[:2], dtype=torch.bool))
        kept = self._kept(list(parts), matrix, products_about(products, centers), num_byzantine)
        weights = _clipped(products, centers, kept, num_byzantine)
        return matrix.join([part.combine(of_part) for part, of_part in zip(parts.values(), weights, strict=True)])

    def _kept(self, names: list[str], matrix: WorkerMatrix, deviations: Tensor, num_byzantine: int) -> Tensor:
        """Return which rows deviate no more than noise does, [s, n] bool."""
        averages, sizes = self.histories.updated(names, matrix.workers, deviations, matrix.num_offered)
        everyone = torch.ones_like(sizes, dtype=torch.bool)
        kept = everyone & ~_farthest(sizes, everyone, _VERY_FAR, num_byzantine)
        kept &= ~explaining_workers(averages, kept, num_byzantine)
        return kept & ~_farthest(sizes, kept, _FAR, num_byzantine)


def _farthest(sizes: Tensor, kept: Tensor, bound: float, num_byzantine: int) -> Tensor:
    """Return the largest of the sizes above a bound, as long as no more than f rows are left out, [s, n] bool."""
    order = sizes.masked_fill(~kept, torch.inf).argsort(dim=1, descending=True, stable=True)
    return kept & (order.argsort(dim=1) < num_byzantine) & (sizes > bound)


def _clipped(products: Tensor, centers: Tensor, kept: Tensor, num_byzantine: int) -> Tensor:
    """Return the weights of the mean of the kept rows, clipped to a ball around the center of all rows, [s, n]."""
    # Of all rows: liars who make the others leave honest workers out must not choose the center.
    distances = distances_from(products, centers)
    num_honest = torch.full((len(kept), 1), kept.shape[1] - num_byzantine)
    radius = _SLACK * smallest(distances, torch.ones_like(kept), num_honest)
    is_far = (distances > radius) & kept
    mean = torch.where(is_far, radius / distances, 1.0) * kept / kept.sum(1, keepdim=True)
    return torch.where(is_far.any(1, keepdim=True), mean + (1 - mean.sum(1, keepdim=True)) * centers, mean)
