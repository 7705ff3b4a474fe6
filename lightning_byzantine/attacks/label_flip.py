"""Training on wrong labels."""

from typing import Any

import torch
from torch import Tensor

from lightning_byzantine.attacks.attack import DataAttack
from lightning_byzantine.utilities.checks import check_integer_at_least

__all__ = ["LabelFlip"]


class LabelFlip(DataAttack):
    """Each Byzantine worker trains on labels K - 1 - y instead of y, and follows the protocol otherwise.

    Args:
        num_classes: K.
        target: where a batch holds its labels: index into a sequence, or key of a dictionary.

    Source: Tolpegin et al., "Data Poisoning Attacks Against Federated Learning Systems", ESORICS 2020.

    Example:
        >>> LabelFlip(num_classes=10).poison((torch.zeros(3, 2), torch.tensor([0, 1, 9])))[1]
        tensor([9, 8, 0])

    """

    def __init__(self, num_classes: int, target: int | str = 1) -> None:
        super().__init__()
        self.num_classes = check_integer_at_least("num_classes", num_classes, 2)
        if isinstance(target, bool) or not isinstance(target, int | str):
            raise TypeError(f"target must be an index or a key of a batch, got {target!r}")
        self.target = target

    def poison(self, batch: Any) -> Any:
        """Return the batch with its labels flipped.

        Args:
            batch: a tuple, list or dictionary whose ``target`` entry is an integer tensor of labels in [0, K).

        Raises:
            TypeError: if the labels are not an integer tensor.
            ValueError: if the batch has no ``target`` entry, or a label is outside [0, K).

        """
        if isinstance(batch, dict):
            return {**batch, self.target: self._flipped_labels(batch)}
        if isinstance(batch, tuple | list):
            items = list(batch)
            items[int(self.target)] = self._flipped_labels(batch)
            # Named tuples are built from positional arguments, not from an iterable.
            return type(batch)(*items) if hasattr(batch, "_fields") else type(batch)(items)
        raise TypeError(f"LabelFlip needs a tuple, list or dict as a batch, got {type(batch).__name__}")

    def _flipped_labels(self, batch: Any) -> Tensor:
        try:
            labels = batch[self.target]
        except (LookupError, TypeError) as error:
            found = sorted(batch) if isinstance(batch, dict) else f"{len(batch)} items"
            raise ValueError(
                f"target must be where the batch has its labels, got target={self.target!r} with {found}"
            ) from error
        if not isinstance(labels, Tensor) or labels.is_floating_point() or labels.dtype == torch.bool:
            kind = labels.dtype if isinstance(labels, Tensor) else type(labels).__name__
            raise TypeError(f"labels to flip must be an integer tensor, got {kind} at target={self.target!r}")
        if labels.numel() and not 0 <= int(labels.min()) <= int(labels.max()) < self.num_classes:
            raise ValueError(
                f"labels must be in [0, num_classes) with num_classes={self.num_classes},"
                f" got {int(labels.min())} to {int(labels.max())}"
            )
        return self.num_classes - 1 - labels
