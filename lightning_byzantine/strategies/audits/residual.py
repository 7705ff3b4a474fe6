"""How far what a worker has sent is from what its batch leads to."""

from collections.abc import Iterable
from dataclasses import dataclass
from math import sqrt

import torch
from torch import Tensor

from lightning_byzantine.estimators import Estimator
from lightning_byzantine.strategies.audits.replay import Gradients
from lightning_byzantine.strategies.audits.sent_rows import SentRow

__all__ = ["Residual"]

# How many roundings of a row of this size the estimator's formula may add up to.
_ROUNDINGS = 4


@dataclass(frozen=True)
class Residual:
    """The difference, and what it is measured by.

    Args:
        blocks: what was sent minus what the batch leads to, [c] for each block; 0 for parameters that took no part in
            the step, or whose last estimate is not known.
        scale: the norm of the gradient's part in what was sent.
        rounding: the norm of the difference that rounding explains.

    """

    blocks: list[Tensor]
    scale: float
    rounding: float

    @classmethod
    def of(
        cls, sent: SentRow, last: SentRow | None, gradients: Gradients, estimator: Estimator | None
    ) -> "Residual | None":
        """Compare a row with what the estimator makes of gradients; None if no parameter's last estimate is known.

        Args:
            sent: the complete row.
            last: the one before; only needed with an estimator.
            gradients: what an auditor has computed.
            estimator: what workers send; None for their gradients.

        """
        follows = {} if last is None else last.by_name()
        expected = {
            name: _expected(row, follows.get(name), gradients, name, estimator)
            for name, row in sent.by_name().items()
            if estimator is None or name in follows
        }
        if not expected:
            return None
        blocks = []
        for whole, (names, sizes) in zip(sent.parts, sent.layouts, strict=True):
            parts = zip(torch.split(whole, sizes), names, strict=True)
            differences = [row - expected[name] if name in expected else torch.zeros_like(row) for row, name in parts]
            blocks.append(torch.cat(differences))
        here, before = _weights(estimator)
        scale = here * _norm(gradients.here.values()) + before * _norm(gradients.before.values())
        sizes_of_rows = _norm(sent.parts) + (0.0 if last is None else _norm(last.parts))
        spacing = max(torch.finfo(part.dtype).eps for part in sent.parts)
        return cls(blocks, scale, gradients.precision**0.5 * scale + _ROUNDINGS * spacing * sizes_of_rows)

    def norm(self, num_owners: int = 1, num_byzantine: int = 0) -> float:
        """Return the norm, without the columns of the f owners in which it is largest: they could have changed them.

        Args:
            num_owners: number of ranks that have received the columns in equal shards; 1 if each has received all.
            num_byzantine: f.

        """
        squares = torch.zeros(num_owners, dtype=torch.float64)
        for block in self.blocks:
            padded = torch.nn.functional.pad(block, (0, -len(block) % num_owners))
            squares += torch.linalg.vector_norm(padded.view(num_owners, -1), dim=1, dtype=torch.float64).square().cpu()
        # NaN is the largest.
        return float(squares.sort().values[: num_owners - num_byzantine].sum().sqrt())


def _expected(row: Tensor, last: Tensor | None, gradients: Gradients, name: str, estimator: Estimator | None) -> Tensor:
    gradient = gradients.here.get(name)
    gradient = torch.zeros_like(row) if gradient is None else gradient.to(row)
    if estimator is None:
        return gradient
    out, before = torch.empty_like(row), gradients.before.get(name)
    estimator.follow(last, gradient, None if before is None else before.to(row), out)
    return out


def _weights(estimator: Estimator | None) -> tuple[float, float]:
    """Return the factors on the gradients here and before in what a worker sends."""
    if estimator is None:
        return 1.0, 0.0
    one, zero, here, before = torch.ones(1), torch.zeros(1), torch.empty(1), torch.empty(1)
    estimator.follow(zero, one, None, here)
    estimator.follow(zero, zero, one, before)
    return abs(here.item()), abs(before.item())


def _norm(parts: Iterable[Tensor]) -> float:
    total = 0.0
    for part in parts:
        total += float(torch.linalg.vector_norm(part, dtype=torch.float64)) ** 2
    return sqrt(total)
