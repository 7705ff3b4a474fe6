"""The weights of the geometric median, from inner products."""

import torch
from torch import Tensor

from lightning_byzantine.matrix.gram import Gram

__all__ = ["median_weights"]

# A distance below this fraction of the median distance is rounding error.
_LEAST = 1e-13
# A sum of changes below this fraction of their sizes is rounding error.
_ROUNDING = 2.0**-51
# Each step is tried in these lengths, [10, 1, 1].
_LENGTHS = 2.0 ** torch.tensor([0, 1, 2, -1, -2, -3, -4, -6, -9, -13], dtype=torch.float64)[:, None, None]


def median_weights(gram: Gram, max_iterations: int, tolerance: float) -> tuple[Tensor, float]:
    """Return w such that sum_i w_i x_i is the geometric median.

    Rows on a line have the median of their positions on it. Otherwise, a row is the median if the others pull at it
    with ||sum_i (x_i - x_k) / ||x_i - x_k|| || at most the number of its copies (Vardi & Zhang). If there is none,
    Newton's method descends on sum_i ||x_i - z|| from the row r where it is least, and so meets no other row. z is kept
    as weights, which makes the cost independent of d.

    Args:
        gram: products about a row amid the others, [m, m].
        max_iterations: at most this many steps.
        tolerance: stop after a step of Newton's that is shorter than this fraction of the median distance to the rows.

    Returns:
        The weights, [m], non-negative with sum 1; and how far ``gram.errors`` may have moved the result, as a fraction
        of the median distance.

    Example:
        >>> rows = torch.tensor([[0.0, 0.0], [3.0, 0.0], [-3.0, 0.0], [0.0, 1.0]], dtype=torch.float64)
        >>> gram = Gram(rows @ rows.T, torch.zeros(4, 4, dtype=torch.float64))
        >>> median_weights(gram, max_iterations=100, tolerance=1e-8)[0]
        tensor([1., 0., 0., 0.], dtype=torch.float64)

    """
    products = gram.products
    distances = gram.squared_distances()[0].sqrt()
    copies = distances == 0
    counts = copies.sum(1)
    positions = _positions_on_a_line(gram)
    if positions is not None:
        order = positions.argsort()
        middle = order[[(len(order) - 1) // 2, len(order) // 2]]
        return (copies[middle] / counts[middle, None].double()).mean(0), torch.inf
    inverse = torch.where(copies, 0.0, 1 / distances)
    pulls = inverse - inverse.sum(1).diag()
    squared_pulls = (pulls @ products * pulls).sum(1)
    margins = squared_pulls - counts.square()
    is_decided = bool((margins.abs() > (pulls.abs() @ gram.errors * pulls.abs()).sum(1)).all())
    if (margins <= 0).any():
        met = copies[margins.argmin()]
        return met / met.sum().double(), 0.0 if is_decided else torch.inf
    # By how much the sum is larger than at the origin, without differences of distances, which lose digits to far rows.
    norms = products.diagonal()
    lengths = (distances + norms.sqrt()).clamp(min=torch.finfo(torch.float64).tiny)
    sums = ((norms[:, None] - 2 * products) / lengths).sum(1)
    least = int(sums.argmin())
    stay = counts[least] / squared_pulls[least].sqrt()
    start = (1 - stay) * inverse[least] / inverse[least].sum() + stay * copies[least] / counts[least]
    about_least = products - products[least] - products[:, least, None] + products[least, least]
    about_least.masked_fill_(copies[least] | copies[least][:, None], 0)
    weights = _descend(about_least, start, max_iterations, tolerance)
    return weights, _error(gram, weights) if is_decided else torch.inf


def _positions_on_a_line(gram: Gram) -> Tensor | None:
    """Return signed distances of the rows from the origin if all angles are 0 or 180 degrees but for errors, [m]."""
    norms, errors = gram.products.diagonal().clamp(min=0).sqrt(), gram.errors
    known_best = int(torch.where(norms > 0, errors.diagonal() / norms.square(), torch.inf).argmin())
    along, lengths = gram.products[known_best], norms * norms[known_best]
    if (along.abs() < lengths - errors[known_best]).any():
        return None
    return along.sign() * norms


def _descend(products: Tensor, weights: Tensor, max_iterations: int, tolerance: float) -> Tensor:
    """Return the weights of the point with the least sum of distances, starting from others.

    Each step is the best one of several lengths in two directions: Newton's and, in case that is no good, Weiszfeld's.
    """
    for _ in range(max_iterations):
        offsets, distances = _seen_from(products, weights)
        weiszfeld = _inverse(distances)
        directions = torch.stack([_newton_step(weights, weiszfeld, offsets, distances), weiszfeld - weights])
        # With s = sum_i v_i x_i, ||x_i - z - t s||^2 is larger than ||x_i - z||^2 by t^2 s.s - 2 t s.(x_i - z). Changes
        # of distances follow without differences of distances, in which far rows would take the others' digits.
        seen = directions @ products
        squared_lengths = (directions * seen).sum(1).clamp(min=0)
        along = seen - (seen @ weights)[:, None]
        growth = _LENGTHS.square() * squared_lengths[:, None] - 2 * _LENGTHS * along
        changes = growth / (distances + (distances.square() + growth).clamp(min=0).sqrt())
        change, best = changes.sum(2).view(-1).min(0)
        if -change <= _ROUNDING * changes.view(-1, len(distances))[best].abs().sum():
            break
        length, direction = divmod(int(best), 2)
        weights = weights + _LENGTHS[length, 0] * directions[direction]
        if squared_lengths[0].sqrt() <= tolerance * distances.median():
            break
    # Of all weights that make up the same point, those which Weiszfeld's iteration ends with.
    return _inverse(_seen_from(products, weights)[1])


def _newton_step(weights: Tensor, weiszfeld: Tensor, offsets: Tensor, distances: Tensor) -> Tensor:
    """Return a step as weights of the rows, [m].

    With u_i = (z - x_i) / d_i and p_i = 1 / (d_i eta), where eta = sum_i 1 / d_i, the gradient is sum_i u_i, and the
    Hessian sum_i (I - u_i u_i^T) / d_i = eta (I - U P U^T). By Woodbury's identity, the inverse of the Hessian is
    (I + U R (I - R K R)^-1 R U^T) / eta, where R is the root of P, and K = U^T U has the cosines.
    """
    cosines, root = _cosines(offsets, distances), weiszfeld.sqrt()
    # Not singular, even on a line.
    hessian = (1 + 1e-15) * torch.eye(len(root), dtype=torch.float64) - cosines * root * root[:, None]
    along: Tensor = torch.linalg.solve_ex(hessian, root * cosines.sum(1))[0]
    step = (1 + root * along) * weiszfeld
    return step - step.sum() * weights


def _seen_from(products: Tensor, weights: Tensor) -> tuple[Tensor, Tensor]:
    """Return (x_i - z).(x_j - z), [m, m], and ||x_i - z||, [m], for z = sum_i w_i x_i."""
    center = products @ weights
    offsets = products - center - center[:, None] + weights @ center
    distances = offsets.diagonal().clamp(min=0).sqrt()
    return offsets, distances.clamp(min=_LEAST * float(distances.median()))


def _inverse(distances: Tensor) -> Tensor:
    inverse = 1 / distances
    return inverse / inverse.sum()


def _cosines(offsets: Tensor, distances: Tensor) -> Tensor:
    return (offsets / distances / distances[:, None]).fill_diagonal_(1)


def _error(gram: Gram, weights: Tensor) -> float:
    """Return how far the errors of products may have moved the median, as a fraction of the median distance.

    To first order: what they do to the distances, and these to an iteration of Weiszfeld's, times the condition of the
    Hessian.
    """
    offsets, distances = _seen_from(gram.products, weights)
    root = _inverse(distances).sqrt()
    curvature = 1 - torch.linalg.eigvalsh(_cosines(offsets, distances) * root * root[:, None])[-1]
    errors = gram.errors.diagonal() / (2 * distances)
    return float(root.square() @ errors / distances.median() / curvature.clamp(min=1e-15))
