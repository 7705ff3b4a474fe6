"""Flipped bits, as from faulty hardware."""

from collections.abc import Sequence

import torch
from torch import Tensor

from lightning_byzantine.attacks.attack import VectorAttack, replace_rows
from lightning_byzantine.matrix import WorkerMatrix
from lightning_byzantine.utilities.checks import check_integer_at_least, check_probability
from lightning_byzantine.utilities.rng import StepSeed

__all__ = ["BitFlip"]

# Integers of the same width as a floating-point number, by its size in bytes.
_INTEGERS = {2: torch.int16, 4: torch.int32, 8: torch.int64}


class BitFlip(VectorAttack):
    """Each Byzantine worker sends its own estimate with bits of the IEEE 754 representation flipped.

    Bits are numbered from the least significant one. In float32, 0 to 22 are the mantissa, 23 to 30 the exponent and 31
    the sign; flipping 30 turns ordinary gradients into numbers of about 1e38.

    Args:
        bit: which bit. None to draw one for each value.
        probability: probability that bits are flipped in a step; in other steps, the Byzantine workers are honest.
        fraction: probability of each value to be flipped in such a step.
        seed: seed of the draws, which are new in every step and the same on every rank. As with
            :class:`~lightning_byzantine.attacks.GaussianNoise`, values are drawn in DDP's order of the columns, and
            each shard of a sharded matrix has draws of its own.

    Source: Xie et al., "Phocas: Dimensional Byzantine-Resilient Stochastic Gradient Descent", 2018.

    Example:
        >>> BitFlip(bit=31)(torch.tensor([[1.5], [2.0]]), byzantine=[0])
        tensor([[-1.5000],
                [ 2.0000]])

    """

    def __init__(self, bit: int | None = None, probability: float = 1.0, fraction: float = 1.0, seed: int = 0) -> None:
        super().__init__()
        self.bit = None if bit is None else check_integer_at_least("bit", bit, 0)
        self.probability = check_probability("probability", probability)
        self.fraction = check_probability("fraction", fraction)
        self.steps = StepSeed(seed)
        self.draws = StepSeed(seed)

    def tamper(self, matrix: WorkerMatrix, byzantine: Sequence[int]) -> WorkerMatrix:
        """Return a matrix with bits flipped in the Byzantine rows; one generator serves all blocks of a step."""
        generator = self.draws.next(stream=1 + matrix.shard)
        if not self.steps.happens(self.probability):
            return matrix
        return replace_rows(matrix, byzantine, lambda honest, own: self._flip(own, generator))

    def _flip(self, values: Tensor, generator: torch.Generator) -> Tensor:
        integers = _INTEGERS[values.itemsize]
        width = 8 * values.itemsize
        if self.bit is not None and self.bit >= width:
            raise ValueError(f"bit must be in [0, {width}) for {values.dtype}, got {self.bit}")
        bits = torch.randint(width, values.shape, generator=generator) if self.bit is None else torch.tensor(self.bit)
        # For the highest bit, the cast wraps around to the smallest negative integer, which has just that bit set.
        masks = torch.ones_like(bits).bitwise_left_shift(bits).to(values.device, integers)
        if self.fraction < 1:
            masks = masks * (torch.rand(values.shape, generator=generator) < self.fraction).to(masks)
        return values.contiguous().view(integers).bitwise_xor(masks).view(values.dtype)
