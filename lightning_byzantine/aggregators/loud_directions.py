"""Which workers explain the directions in which all disagree most."""

import torch
from torch import Tensor, nn

from lightning_byzantine.aggregators.middles import distances_from, middle_of, middle_weights, products_about, smallest
from lightning_byzantine.utilities.median_of_pairs import median_of_pairs

__all__ = ["explaining_workers"]

# A worker explains a direction if it is this many times farther from the median than the honest majority.
_FAR = 3.0
# Entries of an eigenvector that differ by less than this are equal.
_ROUNDING = 1e-9
# 1 / the median of |x| for a normal x of standard deviation 1.
_STANDARD = 1.4826


def explaining_workers(products: Tensor, among: Tensor, num_byzantine: int) -> Tensor:
    """Return the workers that explain why some directions are louder than noise, [s, m] bool.

    Args:
        products: [s, m, m] float64, averages over several steps of inner products of the workers' deviations.
        among: [s, m] bool, workers to look at; the others are known to be Byzantine.
        num_byzantine: f. At most as many as are left of them are returned.

    Example:
        >>> rows = torch.eye(8, dtype=torch.float64)
        >>> rows[6:] = 2 * rows[7]
        >>> explaining_workers(rows @ rows.T[None], torch.ones(1, 8, dtype=torch.bool), num_byzantine=3)
        tensor([[False, False, False, False, False, False,  True,  True]])

    """
    usual = middle_of(distances_from(products, middle_weights(products, among)), among).square()
    threshold = usual * _thresholds(products, usual, num_byzantine)
    active = among.clone()
    explained = products.new_zeros(*among.shape, 0)
    undecided = (usual[:, 0] > 0).nonzero().flatten()
    for _ in range(2 * num_byzantine):
        undecided = undecided[(~active[undecided]).sum(1) < num_byzantine]
        if len(undecided) == 0:
            break
        unexplained = _unexplained(products[undecided], active[undecided], explained[undecided])
        are_loud = _reach(unexplained, threshold[undecided])
        undecided = undecided[are_loud]
        directions = torch.linalg.eigh(unexplained[are_loud])[1][:, :, -1]
        far = _far_along(directions, active[undecided], num_byzantine)
        active[undecided] &= ~far
        found_nobody = ~far.any(1, keepdim=True)
        explained = nn.functional.pad(explained, (0, 1))
        explained[undecided, :, -1] = directions * found_nobody
    return among & ~active


def _far_along(directions: Tensor, active: Tensor, num_byzantine: int) -> Tensor:
    """Return the active workers farthest from most others along directions, [s, m], as many as may be left out."""
    num_active = active.sum(1, keepdim=True)
    num_honest = active.shape[1] - num_byzantine
    # The mean of the middle two of an even number: the sign of an eigenvector must make no difference.
    middle = smallest(directions, active, (num_active + 1) // 2) + smallest(directions, active, num_active // 2 + 1)
    offsets = (directions - middle / 2).abs()
    usual = smallest(offsets, active, torch.full_like(num_active, num_honest))
    far = active & (offsets > (_FAR * usual).clamp(min=_ROUNDING))
    order = offsets.masked_fill(~far, -1).argsort(dim=1, descending=True, stable=True)
    return far & (order.argsort(dim=1) < num_active - num_honest)


def _thresholds(products: Tensor, usual: Tensor, num_byzantine: int) -> Tensor:
    """Return from what multiple of the usual squared deviation on a direction is loud, [s, 1]."""
    num_workers = products.shape[1]
    lengths = products.diagonal(dim1=1, dim2=2).maximum(usual / 4).sqrt()
    cosines = products.abs().div_(lengths[..., None]).div_(lengths[:, None]).nan_to_num_(0)
    noise = _STANDARD * median_of_pairs(cosines)[:, None]
    most = max(1.5, num_byzantine * (num_workers - num_byzantine) / (2 * num_workers))
    thresholds: Tensor = (1.2 + 3 * num_workers**0.5 * noise).clamp(max=most)
    return thresholds


def _unexplained(products: Tensor, active: Tensor, explained: Tensor) -> Tensor:
    """Return the active workers' products about their mean, [s, m, m], without what is in some directions.

    Args:
        products: [s, m, m].
        active: [s, m] bool.
        explained: [s, m, n], directions to leave out; 0 for none.

    """
    centred = _without_mean(products, active)
    if not explained.any():
        return centred
    among = active[..., None]
    seen = (explained - (explained * among).sum(1, keepdim=True) / among.sum(1, keepdim=True)) * among
    # Not a QR decomposition, since directions of other segments are 0 here.
    without: Tensor = torch.eye(active.shape[1], dtype=torch.float64) - seen @ torch.linalg.pinv(seen)
    return without @ centred @ without


def _reach(products: Tensor, threshold: Tensor) -> Tensor:
    """Return whether the largest eigenvalue is a threshold t or more, [s] bool, given [s, m, m] and [s, 1].

    It is below t if t I - P is positive definite, which takes a tenth of the time that eigenvalues take.
    """
    below = products.neg()
    below.diagonal(dim1=1, dim2=2).add_(threshold)
    reached: Tensor = torch.linalg.cholesky_ex(below).info > 0
    return reached


def _without_mean(products: Tensor, among: Tensor) -> Tensor:
    """Return inner products [s, m, m] about the mean of the chosen rows, and 0 for the others."""
    weights = among / among.sum(1, keepdim=True, dtype=products.dtype)
    centred = products_about(products, weights)
    return centred if among.all() else centred.mul_(among[:, None]).mul_(among[..., None])
