"""Workers who send the mean of the others."""

from typing import Any

import torch
from torch import Tensor

from lightning_byzantine.aggregators.middles import distances_from, products_about
from lightning_byzantine.aggregators.report import Report

__all__ = ["AtTheMean", "at_the_mean"]

# Squared distances from the mean, in average ones: over m, of a worker that is there; of all others.
_NEAR, _FAR = 0.05, 0.25
# Two are always opposite each other.
_LEAST_OTHERS = 3
# Time constant of the running average, in steps.
_STEPS = 25


def at_the_mean(products: Tensor, num_byzantine: int) -> Tensor:
    r"""Return which rows are at the mean of others that spread evenly about it.

    ::

        ||x_i - x||^2 < 0.05 / m usual          x = mean_j x_j, usual = mean_j ||x_j - x||^2

    An honest row has noise of its own. Even without, it would be x's noise away from x, which is usual / m if all
    others are honest.

    But liars may have moved x to an honest row. So nobody counts unless there are at most f such rows, and at least
    three others, for all of which::

        ||x_j - x||^2 >= 0.25 usual
        <x_j - x, x_k - x> <= 0                 for j != k

    Seen from an honest row, two honest ones are at an angle of 60 degrees if all have as much noise, and of less than
    90 degrees in any case. Where all other honest rows are at x as well, so that only one is left, they are far from
    each other.

    Args:
        products: [s, m, m], inner products of the rows' differences from any one point, in each of s parts.
        num_byzantine: f.

    Returns:
        [s, m] bool.

    Example:
        >>> corners = torch.eye(3)  # in expectation, the noise of three honest workers
        >>> rows = torch.stack([*corners, corners.mean(0), corners.mean(0)])
        >>> at_the_mean((rows @ rows.T)[None], num_byzantine=2)
        tensor([[False, False, False,  True,  True]])
        >>> rows = torch.stack([*corners, *(2 * corners[0] - corners[1:])])  # of which the first is the mean
        >>> at_the_mean((rows @ rows.T)[None], num_byzantine=2).any()
        tensor(False)

    """
    squares = _squared_distances(products)
    near, far = _are_near(squares), squares >= _FAR * squares.mean(1, keepdim=True)
    on_one_side = (products_about(products, _equal_weights(products)) > 0) & far[:, None] & far[..., None]
    on_one_side.diagonal(dim1=1, dim2=2).fill_(False)
    is_even = (near | far).all(1) & ~on_one_side.flatten(1).any(1)
    can_tell = is_even & (near.sum(1) <= num_byzantine) & (far.sum(1) >= _LEAST_OTHERS)
    return near & can_tell[:, None]


class AtTheMean:
    """Averages inner products over about 25 steps, to tell who is :func:`at_the_mean` of the others.

    In each parameter, if the rule decides in each. Steps in which nobody is there are passed over.

    Args:
        num_workers: m.

    Example:
        >>> from lightning_byzantine.aggregators import GeometricMedian
        >>> from lightning_byzantine.matrix import WorkerMatrix
        >>> watch = AtTheMean(num_workers=5)
        >>> rows = torch.eye(5)
        >>> rows[3:] = rows[:3].mean(0)
        >>> watch.update(GeometricMedian().decide(WorkerMatrix([rows]), num_byzantine=2).report())
        [False, False, False, True, True]

    """

    def __init__(self, num_workers: int) -> None:
        self._num_workers = num_workers
        # Parts have no names, but those of other parameters have other shares of the columns.
        self._shares: list[float] = []
        self._averages: Tensor | None = None
        self._steps = 0

    def update(self, report: Report) -> list[bool]:
        """Add one step; return who is at the mean in some part, [m]: nobody, if the rule knows no inner products."""
        parts = report.parts or (report,)
        known = [part.products for part in parts if part.products is not None]
        nobody = [False] * self._num_workers
        if len(known) < len(parts):
            return nobody
        workers = (~known[0].diagonal().isnan()).nonzero().flatten()
        products = torch.stack(known)
        if len(workers) < self._num_workers:
            products = products[:, workers[:, None], workers]
        if not _are_near(_squared_distances(products)).any():
            return nobody
        averages = self._added(products, workers, [part.share for part in parts])
        found = torch.zeros(self._num_workers, dtype=torch.bool)
        found[workers] = at_the_mean(averages, len(workers) - report.num_honest).any(0)
        return found.tolist()

    def _added(self, products: Tensor, workers: Tensor, shares: list[float]) -> Tensor:
        """Return the averages of these workers, after one more step."""
        if self._averages is None or self._shares != shares:
            self._shares, self._steps = shares, 0
            self._averages = products.new_zeros(len(shares), self._num_workers, self._num_workers)
        usual = _squared_distances(products).mean(1)[:, None, None]
        # Where all rows are the same, nobody is anywhere else.
        latest = (products_about(products, _equal_weights(products)) / usual).nan_to_num(0, 0, 0)
        pairs = (slice(None), workers[:, None], workers)
        memory = min(1 - 1 / _STEPS, self._steps / (self._steps + 1))
        self._averages[pairs] = latest.lerp(self._averages[pairs], memory)
        self._steps += 1
        return self._averages[pairs]

    def state_dict(self) -> dict[str, Any]:
        """Return the averages, and the number of steps that they are of."""
        averages = None if self._averages is None else self._averages.clone()
        return {"averages": averages, "shares": list(self._shares), "steps": self._steps}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore what :meth:`state_dict` returned for the same number of workers."""
        self._averages = None if state["averages"] is None else state["averages"].clone()
        self._shares, self._steps = list(state["shares"]), state["steps"]


def _squared_distances(products: Tensor) -> Tensor:
    """Return those of the rows from their mean, [s, m], from inner products [s, m, m]."""
    return distances_from(products, _equal_weights(products)).square()


def _are_near(squares: Tensor) -> Tensor:
    """Return which of the squared distances are those of rows at the mean, [s, m] bool."""
    return squares < _NEAR / squares.shape[1] * squares.mean(1, keepdim=True)


def _equal_weights(products: Tensor) -> Tensor:
    """Return the weights of the mean, [s, m]."""
    return torch.full_like(products[:, 0], 1 / products.shape[1])
