"""ALIE: a small shift, hidden in the noise of the honest workers."""

import warnings
from collections.abc import Sequence
from statistics import NormalDist

import torch
from torch import Tensor

from lightning_byzantine.attacks.attack import VectorAttack
from lightning_byzantine.utilities.checks import check_finite

__all__ = ["ALittleIsEnough"]


class ALittleIsEnough(VectorAttack):
    """All Byzantine workers send mu - z sigma, the mean and standard deviation (ddof 1) of each column's honest rows.

    Args:
        z: number of standard deviations; a negative one gives mu + |z| sigma. None for
            Phi^-1((m - f - s) / (m - f)) with s = floor(m / 2 + 1) - f, the largest z that still leaves a majority on
            the attackers' side; with few Byzantine workers that is 0 or less, and harmless.

    Source: Baruch et al., "A Little Is Enough: Circumventing Defenses for Distributed Learning", NeurIPS 2019.

    Example:
        >>> ALittleIsEnough(z=1.0)(torch.tensor([[1.0], [2.0], [3.0], [9.0]]), byzantine=[3])
        tensor([[1.],
                [2.],
                [3.],
                [1.]])

    """

    def __init__(self, z: float | None = None) -> None:
        super().__init__()
        self.z = None if z is None else check_finite("z", z)

    def check(self, num_workers: int, byzantine: Sequence[int]) -> None:
        """Raise :class:`ValueError` if z has no value for these numbers of workers; warn if it does no harm."""
        super().check(num_workers, byzantine)
        z = self._deviations(num_workers, len(byzantine))
        if z == 0 or (z < 0 and self.z is None):
            warnings.warn(
                f"ALittleIsEnough has z={z:.2f} with {len(byzantine)} of {num_workers} workers, which does no harm."
                " Pass another z or attack with more workers.",
                stacklevel=2,
            )

    def forge(self, honest: Tensor, own: Tensor) -> Tensor:
        """Return mu - z sigma, once for each Byzantine worker."""
        z = self._deviations(len(honest) + len(own), len(own))
        # The deviation of a single row is NaN.
        deviation = honest.std(dim=0) if len(honest) > 1 else torch.zeros_like(honest[0])
        return (honest.mean(dim=0) - z * deviation).expand_as(own)

    def _deviations(self, num_workers: int, num_byzantine: int) -> float:
        if self.z is not None:
            return self.z
        num_honest = num_workers - num_byzantine
        num_supporters = num_workers // 2 + 1 - num_byzantine
        quantile = (num_honest - num_supporters) / num_honest
        if not 0 < quantile < 1:
            raise ValueError(
                f"z must be given where its formula has no value, got z=None with {num_byzantine} of {num_workers}"
                f" workers (Phi^-1({quantile:.2f}))"
            )
        return NormalDist().inv_cdf(quantile)
