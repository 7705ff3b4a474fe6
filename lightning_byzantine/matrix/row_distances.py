"""Distances between rows, and of rows from points."""

from collections.abc import Callable

from torch import Tensor

from lightning_byzantine.matrix.gram import Gram, are_sharp
from lightning_byzantine.matrix.points import Combination, Point, as_lazy
from lightning_byzantine.matrix.row_view import RowView
from lightning_byzantine.matrix.ties import is_decided, nearest

__all__ = ["RowDistances"]


class RowDistances:
    """Norms and distances of m rows, from as few passes over the columns as rounding permits.

    Args:
        view: the rows.

    """

    def __init__(self, view: RowView) -> None:
        self._view = view
        self._distances_from_center: Tensor | None = None  # of the center that was measured last

    def squared_norms(self) -> Tensor:
        """Return ||x_i||^2, [m], in one pass; non-finite if the row is, or the float64 sum overflows."""
        return self._view.squared_norms()

    def squared_distances(self) -> Tensor:
        """Return ||x_i - x_j||^2, [m, m], from the Gram matrix: one pass for all rules and views together."""
        return self._view.gram.squared_distances()[0]

    def exact_squared_distances(self) -> Tensor:
        """Return ||x_i - x_j||^2, [m, m], in float64: for statistics that don't grow with each of the distances."""
        return self._view.exact_gram.squared_distances()[0]

    def products_of_parts(self) -> Tensor:
        """Return the inner products (x_i - o).(x_j - o) in each segment, [s, m, m], about a row o amid the others.

        They may be off by a millionth of the distances from o, because another pass would be one for each segment.

        Returns:
            in the order of :meth:`~lightning_byzantine.matrix.WorkerMatrix.split`.

        """
        gram = Gram.of_several([part.rough_gram for part in self._view.split()])
        central = gram.central_rows()[:, None, None]
        from_central = gram.products.take_along_dim(central, dim=1)
        of_central = from_central.take_along_dim(central, dim=2)
        return gram.products - from_central - from_central.mT + of_central

    def products_about(self, row: int, exact: bool = False) -> Gram:
        """Return the inner products (x_i - x_r).(x_j - x_r) with bounds of their errors.

        Args:
            row: r. Its products and those of its copies are exactly 0.
            exact: whether they have to be accurate to float64.

        """
        products = self._view.products
        return (products.exact_gram if exact else products.gram).about(self._view.weights, row)

    def lowest(self, statistic: Callable[[Tensor], Tensor], count: int) -> Tensor:
        """Return the indices of the lowest values of a statistic of squared distances, ties broken by index.

        Args:
            statistic: maps [m, m] to [k, n], or [n]; must grow with each of the distances.
            count: number of indices, at most n.

        Returns:
            [k, count], or [count]: indices in [0, n), lowest first.

        """
        squared, errors = self._view.gram.squared_distances()
        if errors.any() and not is_decided(statistic(squared - errors), statistic(squared + errors), count):
            squared = self.exact_squared_distances()
        return nearest(statistic(squared), count)

    def nearest(self, center: Point, count: int) -> Tensor:
        """Return the indices of the ``count`` rows nearest to a point, ties broken by index: [count], nearest first."""
        squared, errors = self._measure_from(center)
        if errors.any() and not is_decided(squared - errors, squared + errors, count):
            squared = as_lazy(center).exact_squared_distances(self._view)
        return nearest(squared.sqrt(), count)

    def distances(self, center: Point) -> Tensor:
        """Return ||x_i - center||, [m]: no pass over the columns when ``center`` is a :class:`Combination`."""
        squared, errors = self._measure_from(center)
        return (squared if are_sharp(squared, errors) else as_lazy(center).exact_squared_distances(self._view)).sqrt()

    def length(self, direction: Tensor) -> Tensor:
        """Return ||sum_i u_i x_i|| for weights u, [m], whose sum is 0: the length of a step between combinations."""
        steps = self._view.products.gram.mixed(direction[None] @ self._view.weights)
        return steps.squared_norms()[0].sqrt().squeeze(0)

    def known_products_about(self, point: Point) -> Tensor | None:
        """Return <x_i - point, x_j - point>, [m, m], if inner products are known; needs no pass and no collective."""
        return as_lazy(point).known_products(self._view)

    @property
    def distances_from_center(self) -> Tensor | None:
        """Distances from the center of the last :meth:`nearest` or :meth:`distances`, [m]; None of a combination's."""
        return self._distances_from_center

    def known_norms(self) -> Tensor:
        """Return ||x_i||, [m], of rows that were not mixed, without a separate pass if inner products are needed."""
        return self._view.products.squared_norms().clamp(min=0).sqrt()

    def _measure_from(self, center: Point) -> tuple[Tensor, Tensor]:
        """Return ||x_i - center||^2, [m], and their errors, quickly if possible."""
        squared, errors = as_lazy(center).squared_distances(self._view)
        if not isinstance(center, Combination):
            self._distances_from_center = squared.sqrt()
        return squared, errors
