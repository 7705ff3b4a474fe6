"""ROP: at the previous aggregate, moved at a right angle to it."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from lightning_byzantine.attacks.attack import VectorAttack, forge_rows
from lightning_byzantine.attacks.honest_statistics import honest_mean, honest_radius, honest_rows
from lightning_byzantine.matrix import WorkerMatrix
from lightning_byzantine.utilities.checks import check_at_least, check_finite, check_probability

__all__ = ["RelocatedOrthogonalPerturbation"]

# Below this sine of the angle between all ones and u, what is orthogonal to u is rounding errors.
_PARALLEL = 1e-7


class RelocatedOrthogonalPerturbation(VectorAttack):
    """All Byzantine workers send the same vector beside the previous aggregate v, from which centered clipping starts.

    ::

        u = reference * v + (1 - reference) * mu                    mu: the honest mean
        p = 1 - (1.u / ||u||^2) u                                   1: all ones
        sent: relocation * v + (1 - relocation) * mu + z * r * (sin(angle) p / ||p|| + cos(angle) u / ||u||)

    where r is the honest radius, median_i ||x_i - mu||. With full relocation, the vector is z * r away from v, at a
    right angle to it: clipping around v leaves it as it is, and it points the same way in every step.

    v is known where the rule in use is one that starts from it, such as ``CenteredClipping``, after the first step;
    elsewhere, mu stands in its place. In the paper z is an absolute length, chosen like the clipping radius.

    Args:
        z: length of the perturbation, in honest radii.
        angle: between the perturbation and u, in degrees; 90 and 270 are right angles. At 270, gradients are too small
            in all coordinates, so that the weights grow.
        relocation: from mu, 0, to v, 1.
        reference: from mu, 0, to v, 1.

    Source: Ozfatura et al., "Byzantines Can Also Learn From History: Fall of Centered Clipping in Federated Learning",
    IEEE TIFS 2024 (arXiv 2208.09894); defaults of its authors'
    https://github.com/CRYPTO-KU/FL-Byzantine-Library.

    Example:
        >>> attack = RelocatedOrthogonalPerturbation()
        >>> attack(torch.tensor([[1.0, 0.0], [3.0, 0.0], [9.0, 9.0]]), byzantine=[2])[2]
        tensor([ 2., -1.])

    """

    def __init__(self, z: float = 1.0, angle: float = 270.0, relocation: float = 1.0, reference: float = 0.9) -> None:
        super().__init__()
        self.z = check_at_least("z", z, 0)
        self.angle = check_finite("angle", angle)
        self.relocation = check_probability("relocation", relocation)
        self.reference = check_probability("reference", reference)

    def tamper(self, matrix: WorkerMatrix, byzantine: Sequence[int]) -> WorkerMatrix:
        """Return a matrix with forged Byzantine rows."""
        honest = honest_rows(matrix, byzantine)
        mean = honest_mean(honest)
        last = mean
        if matrix.previous is not None:
            last = matrix.with_blocks([part[None].double() for part in matrix.previous])
        reference = _unit(_between(mean, last, self.reference))
        ones = _ones(matrix, mean)
        orthogonal = _unit(_sum(ones, reference, -_product(ones, reference)), least=_PARALLEL * _norm(ones))
        angle = math.radians(self.angle)
        length = self.z * honest_radius(honest)
        location = _between(mean, last, self.relocation)
        forged = _sum(location, orthogonal, length * math.sin(angle))
        parts = iter(_sum(forged, reference, length * math.cos(angle)).blocks)
        return forge_rows(matrix, byzantine, lambda honest, own: next(parts).expand_as(own))


def _sum(first: WorkerMatrix, second: WorkerMatrix, factor: float) -> WorkerMatrix:
    """Return first + factor * second."""
    return first.with_blocks([one + factor * other for one, other in zip(first.blocks, second.blocks, strict=True)])


def _between(start: WorkerMatrix, end: WorkerMatrix, share: float) -> WorkerMatrix:
    pairs = zip(start.blocks, end.blocks, strict=True)
    return start.with_blocks([torch.lerp(one, other, share) for one, other in pairs])


def _norm(vector: WorkerMatrix) -> float:
    return vector.squared_norms().sqrt().item()


def _unit(vector: WorkerMatrix, least: float = 0.0) -> WorkerMatrix:
    """Return the vector with length 1, or 0 if it is not longer than ``least``."""
    norm = _norm(vector)
    return vector.map_blocks(lambda block: block / norm if norm > least else torch.zeros_like(block))


def _product(first: WorkerMatrix, second: WorkerMatrix) -> float:
    """Return the inner product, over the columns of all ranks."""
    plus, minus = _sum(first, second, 1.0).squared_norms(), _sum(first, second, -1.0).squared_norms()
    return ((plus - minus) / 4).item()


def _ones(matrix: WorkerMatrix, like: WorkerMatrix) -> WorkerMatrix:
    """Return 1 in all columns of parameters; others, such as padding, are 0 in all rows."""
    if matrix.segments is None:
        return like.map_blocks(torch.ones_like)
    blocks: list[Tensor] = [torch.zeros_like(block) for block in like.blocks]
    for block, columns in zip(blocks, matrix.segments.columns, strict=True):
        for _, part in columns:
            block[:, part] = 1.0
    return like.with_blocks(blocks)
