"""Which workers explain the directions in which all disagree most."""

import torch
from torch import Tensor

from lightning_byzantine.aggregators.middles import distances_from, middle_of, middle_weights, products_about

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
    # Few segments are loud when nobody attacks. The largest eigenvalue is below the threshold t if t I - P is positive
    # definite, which takes a tenth of the time that eigenvalues take.
    below = threshold[..., None] * torch.eye(among.shape[1], dtype=products.dtype) - _without_mean(products, among)
    are_loud = torch.linalg.cholesky_ex(below).info > 0
    explaining = torch.zeros_like(among)
    for index in (are_loud & (usual[:, 0] > 0)).nonzero().flatten().tolist():
        explaining[index] = _explaining(products[index], among[index], float(threshold[index]), num_byzantine)
    return explaining


def _explaining(products: Tensor, among: Tensor, threshold: float, num_byzantine: int) -> Tensor:
    """Return which workers explain the directions above a threshold in one segment, [m] bool."""
    active = among.clone()
    explained = torch.zeros(len(products), 0, dtype=torch.float64)
    for _ in range(2 * num_byzantine):
        left = num_byzantine - int((~active).sum())
        if left == 0:
            break
        loudness, direction = _loudest(products, active, explained)
        if loudness <= threshold:
            break
        offsets = (direction[active] - _median(direction[active])).abs()
        far = offsets > (_FAR * offsets.sort().values[len(offsets) - left - 1]).clamp(min=_ROUNDING)
        if not far.any():
            explained = torch.cat([explained, direction[:, None]], dim=1)
            continue
        farthest = offsets.masked_fill(~far, 0).argsort(descending=True, stable=True)[: min(left, int(far.sum()))]
        active[active.nonzero().flatten()[farthest]] = False
    return among & ~active


def _median(values: Tensor) -> Tensor:
    """Return the mean of the middle two of an even number: the sign of an eigenvector must make no difference."""
    return (values.median() - (-values).median()) / 2


def _thresholds(products: Tensor, usual: Tensor, num_byzantine: int) -> Tensor:
    """Return from what multiple of the usual squared deviation on a direction is loud, [s, 1]."""
    num_workers = products.shape[1]
    lengths = products.diagonal(dim1=1, dim2=2).maximum(usual / 4).sqrt()
    cosines = (products / lengths[:, None] / lengths[..., None]).abs()
    others = ~torch.eye(num_workers, dtype=torch.bool)
    noise = _STANDARD * cosines[:, others].nan_to_num(0).median(dim=1, keepdim=True).values
    most = max(1.5, num_byzantine * (num_workers - num_byzantine) / (2 * num_workers))
    thresholds: Tensor = (1.2 + 3 * num_workers**0.5 * noise).clamp(max=most)
    return thresholds


def _loudest(products: Tensor, active: Tensor, explained: Tensor) -> tuple[float, Tensor]:
    """Return the largest eigenvalue of the active workers' products about their mean, and its vector, [m]."""
    centred = _without_mean(products[None], active[None])[0][active][:, active]
    if explained.shape[1]:
        basis = torch.linalg.qr(explained[active] - explained[active].mean(0)).Q
        without = torch.eye(len(basis), dtype=torch.float64) - basis @ basis.T
        centred = without @ centred @ without
    eigenvalues, vectors = torch.linalg.eigh(centred)
    direction = torch.zeros(len(products), dtype=torch.float64)
    direction[active] = vectors[:, -1]
    return float(eigenvalues[-1]), direction


def _without_mean(products: Tensor, among: Tensor) -> Tensor:
    """Return inner products [s, m, m] about the mean of the chosen rows, and 0 for the others."""
    weights = among / among.sum(1, keepdim=True, dtype=products.dtype)
    return products_about(products, weights) * (among[:, None] & among[..., None])
