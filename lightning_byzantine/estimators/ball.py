"""The set that double momentum keeps its iterates in."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from lightning_byzantine.utilities.checks import check_positive

__all__ = ["Ball", "ball_of"]


@dataclass(frozen=True)
class Ball:
    """The ball of a radius around the origin or the starting point, and the Euclidean projection onto it.

    ::

        w <- c + min(1, radius / ||w - c||) (w - c)

    Args:
        radius: in the unit of the parameters, above 0.
        center: c: "origin" for 0, "start" for the parameters' values before the first step.
        per_tensor: whether each parameter tensor has a ball of its own; otherwise, w is the vector of all.

    Raises:
        TypeError: if the radius is not a number, or ``per_tensor`` not a bool.
        ValueError: if the radius is not finite and above 0, or the center is unknown.

    Example:
        >>> points = [torch.tensor([3.0, 4.0]), torch.tensor([0.5])]
        >>> Ball(radius=1.0).project(points, [torch.zeros(2), torch.zeros(1)])
        >>> points
        [tensor([0.6000, 0.8000]), tensor([0.5000])]

    """

    radius: float
    center: Literal["origin", "start"] = "origin"
    per_tensor: bool = True

    def __post_init__(self) -> None:
        """Check the arguments."""
        check_positive("radius", self.radius)
        if self.center not in ("origin", "start"):
            raise ValueError(f"center must be 'origin' or 'start', got {self.center!r}")
        if not isinstance(self.per_tensor, bool):
            raise TypeError(f"per_tensor must be a bool, got {self.per_tensor!r}")

    @torch.no_grad()
    def project(self, points: Sequence[Tensor], starts: Sequence[Tensor]) -> None:
        """Move the points, in place, to the nearest ones in the ball; those inside stay the same to the bit.

        Args:
            points: the iterates of parameters, of any shapes.
            starts: where the parameters started, of the same shapes; not read if the center is the origin.

        """
        around_start = self.center == "start"
        offsets = [point - start for point, start in zip(points, starts, strict=True)] if around_start else points
        norms = [_norm(offset) for offset in offsets]
        if not self.per_tensor and norms:
            norms = [torch.stack([norm.to(norms[0].device) for norm in norms]).norm()] * len(norms)
        for point, start, offset, norm in zip(points, starts, offsets, norms, strict=True):
            # Without a branch, for which a GPU would have to wait. An infinite norm has no direction, and stays NaN.
            scaled = offset * (self.radius / norm).to(offset)
            inside = start + scaled if around_start else scaled
            point.copy_(torch.where((norm > self.radius).to(point.device), inside, point))


def ball_of(radius: float | None, center: Literal["origin", "start"], per_tensor: bool) -> Ball | None:
    """Return the ball, or None without a radius.

    Raises:
        ValueError: if there is a center, or one ball for all tensors, without a radius.

    """
    if radius is not None:
        return Ball(radius, center, per_tensor)
    if center != "origin" or not per_tensor:
        raise ValueError(f"center and per_tensor need a radius, got {center=}, {per_tensor=} and radius=None")
    return None


def _norm(vector: Tensor) -> Tensor:
    real = torch.view_as_real(vector) if vector.is_complex() else vector
    norm: Tensor = torch.linalg.vector_norm(real, dtype=torch.float64)
    return norm
