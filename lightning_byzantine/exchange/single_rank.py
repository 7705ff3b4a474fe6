"""The exchange of a single process."""

from torch import Tensor

from lightning_byzantine.exchange.exchange import Exchange, Wait

__all__ = ["SingleRank"]


class SingleRank(Exchange):
    """All workers are this process's own, so nothing is sent and no process group is needed.

    Example:
        >>> import torch
        >>> exchange = SingleRank()
        >>> exchange.start(torch.tensor([[1.0, 2.0]]))
        >>> exchange.finish().num_workers
        1

    """

    @property
    def rank(self) -> int:
        """Return 0."""
        return 0

    def on_any_rank(self, flags: Tensor) -> Tensor:
        """Return this rank's flags."""
        return flags.cpu()

    def send(self, index: int, rows: Tensor) -> tuple[Tensor, list[Wait]]:
        """Return the rows; there is nothing to send."""
        return rows, []
