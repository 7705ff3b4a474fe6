"""What a rule remembers about the workers from step to step."""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

__all__ = ["Histories", "History"]


@dataclass
class History:
    """Averages over the last steps of how m workers have deviated, in one segment.

    Args:
        products: [m, m] float64, inner products of the workers' deviations, in units of the usual squared deviation.
        squares: [m] float64, squared deviations in the same units.
        num_steps: how many steps it has seen.

    """

    products: Tensor
    squares: Tensor
    num_steps: int = 0

    @classmethod
    def of(cls, num_workers: int) -> "History":
        """Return that of the first step."""
        zeros = torch.zeros(num_workers, num_workers, dtype=torch.float64)
        return cls(zeros, zeros[0].clone())


class Histories(nn.Module):
    """A history for each segment of the columns, by its name; part of the rule's ``state_dict``.

    Example:
        >>> histories = Histories()
        >>> histories.of("weight", num_workers=3).squares
        tensor([0., 0., 0.], dtype=torch.float64)
        >>> histories.of("weight", num_workers=5)
        Traceback (most recent call last):
        ...
        ValueError: vectors must have as many rows as in the previous calls, of whose workers the rule remembers how \
they deviated, got 5 after 3: use one rule for each number of workers

    """

    def __init__(self) -> None:
        super().__init__()
        self._by_name: dict[str, History] = {}

    def clear(self) -> None:
        """Forget everything."""
        self._by_name.clear()

    def of(self, name: str, num_workers: int) -> History:
        """Return the history of a segment, to be updated in place.

        Raises:
            ValueError: if the number of workers has changed.

        """
        history = self._by_name.setdefault(name, History.of(num_workers))
        if len(history.squares) != num_workers:
            raise ValueError(
                "vectors must have as many rows as in the previous calls, of whose workers the rule remembers how they"
                f" deviated, got {num_workers} after {len(history.squares)}: use one rule for each number of workers"
            )
        return history

    def get_extra_state(self) -> dict[str, Tensor]:
        """Return all histories as tensors, [m + 2, m] by name: products, squares, and the number of steps."""
        return {
            name: torch.cat(
                [
                    history.products,
                    history.squares[None],
                    torch.full_like(history.squares[None], history.num_steps),
                ]
            )
            for name, history in self._by_name.items()
        }

    def set_extra_state(self, state: Mapping[str, Tensor] | None) -> None:
        """Restore all histories."""
        self._by_name = {
            name: History(rows[:-2].clone().cpu(), rows[-2].clone().cpu(), int(rows[-1, 0]))
            for name, rows in (state or {}).items()
        }
