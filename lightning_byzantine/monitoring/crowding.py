"""Workers whose rows are nearer to one another than honest ones are."""

from math import nan
from typing import Any

import torch
from torch import Tensor

from lightning_byzantine.aggregators.report import Report
from lightning_byzantine.utilities.median_of_pairs import median_of_pairs

__all__ = ["Crowding", "crowding"]

# Time constant of the running average, in steps.
_STEPS = 25
# The nearest are at most this many times half as far apart as usual: copies have no distance.
_MOST = 5.0


def crowding(products: Tensor) -> Tensor:
    r"""Return how close each row's nearest other row is.

    ::

        c_i = log2(median_{j < k} d_jk / min_{j != i} d_ij)     in [0, 5]; d_ij = ||x_i - x_j||

    Noise of many columns makes all distances alike, so c_i is about 0 for honest rows, and 1 for one whose nearest is
    half as far away as usual. Any f + 1 rows that crowd together are less than half of all pairs, so that the median is
    that of the others.

    Args:
        products: [m, m], inner products of the rows' differences from any one point; NaN where unknown.

    Returns:
        [m], in the dtype of the products; NaN where unknown.

    Example:
        >>> rows = torch.tensor([[0.0, 8.0], [8.0, 0.0], [0.5, 8.0], [-8.0, 0.0]])
        >>> crowding(rows @ rows.T)
        tensor([4.5000, 0.0451, 4.5000, 0.0000])

    """
    is_known = ~products.diagonal().isnan()
    crowded = torch.zeros_like(products[0]).masked_fill(~is_known, nan)
    if is_known.sum() > 1:
        known = products if is_known.all() else products[is_known][:, is_known]
        squares = known.diagonal()
        squared = (squares[:, None] + squares).sub_(known, alpha=2).clamp_(min=0)
        usual = median_of_pairs(squared)  # from here on, nobody is near to itself
        ratios = (usual / squared.amin(1)).log2() / 2
        # Where all rows are the same, none is nearer than others.
        crowded[is_known] = ratios.nan_to_num(0).clamp(0, _MOST)
    return crowded


class Crowding:
    """Averages over about 25 steps how close each worker's nearest other worker is; see :func:`crowding`.

    Args:
        num_workers: m.

    Attributes:
        averages: [m]; of a worker that nothing was known of for some steps, what it was before.

    Example:
        >>> close = Crowding(num_workers=4)
        >>> close.averages
        [0.0, 0.0, 0.0, 0.0]

    """

    def __init__(self, num_workers: int) -> None:
        self.averages = [0.0] * num_workers

    def update(self, report: Report) -> None:
        """Add one step; nothing, if the rule does not know inner products."""
        if report.products is None:
            return
        latest = crowding(report.products).tolist()
        self.averages = [
            before if value != value else before + (value - before) / _STEPS
            for before, value in zip(self.averages, latest, strict=True)
        ]

    def state_dict(self) -> dict[str, Any]:
        """Return the averages."""
        return {"averages": list(self.averages)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore what :meth:`state_dict` returned for the same number of workers."""
        self.averages = list(state["averages"])
