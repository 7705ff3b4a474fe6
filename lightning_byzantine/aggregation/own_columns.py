"""Which columns of the aggregate a rank has, and how to get those of the others."""

from collections.abc import Mapping, Sequence
from functools import partial

import torch
from torch import Tensor

from lightning_byzantine.aggregation.gradient_block import GradientBlock
from lightning_byzantine.estimators.shared_columns import Columns
from lightning_byzantine.exchange import Exchange

__all__ = ["OwnColumns"]


class OwnColumns:
    """The columns of each parameter that the exchange leaves to this rank.

    Args:
        exchange: divides blocks among ranks, or gives all of them to each.

    Example:
        >>> from lightning_byzantine.exchange import SingleRank
        >>> own = OwnColumns(SingleRank())
        >>> own.of([GradientBlock.of({"weight": torch.ones(2), "bias": torch.zeros(1)})]).own
        [{'weight': slice(0, 2, None), 'bias': slice(0, 1, None)}]

    """

    def __init__(self, exchange: Exchange) -> None:
        self._exchange = exchange
        self._layout: list[tuple[tuple[str, ...], list[int]]] = []
        self._columns = Columns([], [], gather=dict)

    def of(self, blocks: Sequence[GradientBlock]) -> Columns:
        """Return the columns: the same object as in the last step unless DDP has rebuilt its buckets."""
        layout = [(block.names, block.sizes) for block in blocks]
        if layout != self._layout:
            own = [block.places(self._exchange.columns_of(block.buffer.numel())) for block in blocks]
            like = [self._like(block) for block in blocks]
            gather = partial(_gather, self._exchange.without_memory(), layout, own, blocks[0].buffer.device)
            self._layout, self._columns = layout, Columns(own, like, gather if self._exchange.divides_columns else dict)
        return self._columns

    def _like(self, block: GradientBlock) -> Tensor:
        """Return a tensor without memory of its own, of this rank's columns with their padding."""
        length, dtype = block.buffer.numel(), torch.promote_types(block.buffer.dtype, torch.float32)
        one = torch.zeros(1, dtype=dtype, device=block.buffer.device)
        columns = self._exchange.columns_of(length)
        own = one.expand(columns.stop - columns.start)
        return one.expand(self._exchange.padded(own, length).numel())


def _gather(
    exchange: Exchange,
    layout: Sequence[tuple[tuple[str, ...], list[int]]],
    own: Sequence[Mapping[str, slice]],
    device: torch.device,
    parts: Mapping[str, Tensor],
) -> dict[str, Tensor]:
    wholes, gathered = [], {}
    for (names, sizes), places in zip(layout, own, strict=True):
        known = [parts[name] for name in names if name in parts]
        if not known:
            continue
        wholes.append(known[0].new_zeros(sum(sizes), device=device))
        for name, whole in zip(names, torch.split(wholes[-1], sizes), strict=True):
            if name in parts:
                whole[places[name]] = parts[name].to(device)
                gathered[name] = whole
    exchange.complete(wholes)
    # Copies free the memory of blocks. What was moved to the host's memory stays there.
    return {name: whole.to(parts[name].device, copy=True) for name, whole in gathered.items()}
