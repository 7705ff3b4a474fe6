"""An upper bound of an aggregate's distance from the honest mean."""

from math import inf, sqrt

import torch
from torch import Tensor

__all__ = ["distance_from_honest_mean"]

# Every iteration gives an upper bound: more make it lower, by less and less.
_ITERATIONS = 10
# How much the rows' sizes count in the diagonal, against their mean: half of each was the tightest of those tried.
_EVENNESS = 0.5
# Rows without any spread.
_TINY = 1e-200


def distance_from_honest_mean(products: Tensor, num_honest: int) -> float:
    r"""Return an upper bound of ||a - mean of H|| over all sets H of h or more rows.

    ::

        ||a - mean of H||^2 = u^T A u     u_i = 1 / h in H, 0 elsewhere; A_ij = <x_i - a, x_j - a>
                            = u^T (A - D) u + sum_i D_ii u_i / h      for any diagonal D, as u_i is 0 or 1 / h
                           <= max { the same for all u with 0 <= u_i <= 1 / h and sum_i u_i = 1 }

    This holds for each H of h rows, and so for larger ones, whose means are averages of such means. If D - A is
    positive semidefinite where sum_i u_i = 0, the function is concave, and each iteration of Frank and Wolfe's bounds
    its maximum from above. D is as small as possible in proportion to the rows' squared distances from their mean, half
    of which are replaced by their average. With equal numbers in D, and the mean of all n rows for a, the bound is
    sqrt(lambda (1 / h - 1 / n)), where lambda is the largest eigenvalue of A: the resilience of rows of bounded
    covariance.

    Source: Steinhardt, Charikar & Valiant, "Resilience: A Criterion for Learning in the Presence of Arbitrary
    Outliers", ITCS 2018, for that bound; Allouah et al., "Fixing by Mixing: A Recipe for Optimal Byzantine ML under
    Heterogeneity", AISTATS 2023, definition 2, where the bound is a multiple of the honest rows' own spread, which the
    receiver does not know. The diagonal is that of Hammer & Rubin, "Some Remarks on Quadratic Programming with 0-1
    Variables", RIRO 4 (1970); Frank & Wolfe, "An Algorithm for Quadratic Programming", Naval Research Logistics
    Quarterly 3 (1956).

    Args:
        products: [n, n] float64, A.
        num_honest: h, from 1 to n.

    Example:
        >>> seen = torch.tensor([[-3.0, 0.0], [3.0, 0.0], [0.0, 3.0], [0.0, -3.0]], dtype=torch.float64)
        >>> round(distance_from_honest_mean(seen @ seen.T, num_honest=3), 2)  # 1 for any three
        1.22

    """
    unit = float(products.diagonal().max())
    if unit <= 0:
        return 0.0
    products, u = products / unit, torch.full((len(products),), 1 / len(products), dtype=torch.float64)
    diagonal = _dominating(products)
    curvature = products - diagonal.diag()
    bound = inf
    for _ in range(_ITERATIONS):
        slopes = 2 * curvature @ u + diagonal / num_honest
        steepest = slopes.topk(num_honest)
        bound = min(bound, float(steepest.values.mean() - u @ curvature @ u))
        step = -u
        step[steepest.indices] += 1 / num_honest
        gain, bend = float(slopes @ step), float(step @ curvature @ step)
        u = u + (min(1.0, -gain / (2 * bend)) if bend < 0 else 1.0) * step
    return sqrt(max(0.0, bound) * unit)


def _dominating(products: Tensor) -> Tensor:
    """Return a small diagonal D, [n], such that D - A is positive semidefinite where sum_i u_i = 0."""
    means = products.mean(0)
    centred = products - means - means[:, None] + means.mean()
    sizes = centred.diagonal().clamp(min=0)
    sizes = (_EVENNESS * sizes + (1 - _EVENNESS) * sizes.mean()).clamp(min=_TINY)
    roots = sizes.sqrt()
    largest: Tensor = torch.linalg.eigvalsh(centred / roots / roots[:, None])[-1]
    return sizes * largest.clamp(min=0)
