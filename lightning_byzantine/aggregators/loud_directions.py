"""Which workers stand out along the directions in which they disagree most."""

import torch
from torch import Tensor

__all__ = ["medians_of_products", "standing_out"]

# Iterations of Weiszfeld's for a center: it only has to be amid the rows.
_ITERATIONS = 20
# A squared distance below this fraction of the middle one is rounding error.
_LEAST = 1e-12
# A worker stands out along a direction if it is this many times farther from the median than the honest majority.
_FAR = 3.0
# 1 / the median of |x| for a normal x of standard deviation 1.
_STANDARD = 1.4826


def medians_of_products(products: Tensor) -> Tensor:
    """Return the weights of geometric medians, to few digits, given Gram matrices.

    Args:
        products: [.., m, m] float64, inner products about a row amid the others.

    Returns:
        [.., m], weights with sum 1.

    Example:
        >>> rows = torch.tensor([[0.0], [1.0], [2.0], [90.0]], dtype=torch.float64)
        >>> weights = medians_of_products(rows @ rows.T)
        >>> bool(weights @ rows < 2.1)
        True

    """
    weights = torch.full(products.shape[:-1], 1 / products.shape[-1], dtype=torch.float64)
    for _ in range(_ITERATIONS):
        squared = squared_distances_from(products, weights)
        middle = middle_of(squared)[..., None]
        inverse = squared.clamp(min=_LEAST * middle).rsqrt()
        # Where most rows are equal, they are the median.
        inverse = torch.where(middle > 0, inverse, (squared == 0).double())
        weights = inverse / inverse.sum(-1, keepdim=True)
    return weights


def squared_distances_from(products: Tensor, weights: Tensor) -> Tensor:
    """Return ||x_i - sum_j w_j x_j||^2, [.., m], given Gram matrices [.., m, m] and weights [.., m]."""
    seen = (products @ weights[..., None])[..., 0]
    squared = products.diagonal(dim1=-2, dim2=-1) - 2 * seen + (seen * weights).sum(-1, keepdim=True)
    return squared.clamp(min=0)


def middle_of(values: Tensor) -> Tensor:
    """Return the lower median of the last dimension."""
    return values.kthvalue((values.shape[-1] + 1) // 2, dim=-1).values


def standing_out(products: Tensor, num_byzantine: int) -> Tensor:
    """Return up to f workers whose deviations explain the loudest directions, [m] bool.

    Args:
        products: [m, m] float64, averages over several steps of inner products of the workers' deviations.
        num_byzantine: f.

    """
    num_workers = len(products)
    usual = float(middle_of(squared_distances_from(products, medians_of_products(products))))
    active = torch.ones(num_workers, dtype=torch.bool)
    if usual <= 0:
        return ~active
    threshold = usual * _threshold(products, usual, num_byzantine)
    explained = torch.zeros(num_workers, 0, dtype=torch.float64)
    for _ in range(2 * num_byzantine):
        left = num_byzantine - int((~active).sum())
        if left == 0:
            break
        loudness, direction = _loudest(products, active, explained)
        if loudness <= threshold:
            break
        offsets = (direction[active] - direction[active].median()).abs()
        bound = _FAR * offsets.sort().values[len(offsets) - left - 1]
        far = active.clone()
        far[active] = offsets > bound
        if not far.any():
            explained = torch.cat([explained, direction[:, None]], dim=1)
            continue
        farthest = torch.zeros(num_workers, dtype=torch.float64)
        farthest[active] = offsets
        farthest[~far] = 0
        active[farthest.argsort(descending=True, stable=True)[: min(left, int(far.sum()))]] = False
    return ~active


def _threshold(products: Tensor, usual: float, num_byzantine: int) -> float:
    """Return from what multiple of the usual squared deviation on a direction is loud."""
    num_workers = len(products)
    lengths = products.diagonal().clamp(min=usual / 4).sqrt()
    cosines = (products / lengths / lengths[:, None]).abs()
    others = ~torch.eye(num_workers, dtype=torch.bool)
    noise = _STANDARD * float(cosines[others].median())
    most = max(1.5, num_byzantine * (num_workers - num_byzantine) / (2 * num_workers))
    return float(min(1.2 + 3 * num_workers**0.5 * noise, most))


def _loudest(products: Tensor, active: Tensor, explained: Tensor) -> tuple[float, Tensor]:
    """Return the largest eigenvalue of the active workers' products about their mean, and its vector, [m]."""
    size = int(active.sum())
    without = torch.eye(size, dtype=torch.float64) - 1 / size
    if explained.shape[1]:
        basis = torch.linalg.qr(without @ explained[active]).Q
        without = without - basis @ basis.T
    eigenvalues, vectors = torch.linalg.eigh(without @ products[active][:, active] @ without)
    direction = torch.zeros(len(products), dtype=torch.float64)
    direction[active] = vectors[:, -1]
    return float(eigenvalues[-1]), direction
