"""The gradients of a model of which each rank holds a part, on their way through the engine."""

from collections.abc import Iterable, Mapping

import torch
from torch import Tensor, nn

from lightning_byzantine.aggregation.engine import AggregationEngine
from lightning_byzantine.aggregation.gradient_block import GradientBlock
from lightning_byzantine.aggregation.shard_layout import ShardLayout

__all__ = ["ShardedGradients"]

# Elements on all ranks from which on a gradient is a block of its own, in place, instead of a copy among others.
_LARGE = 2**20


class ShardedGradients:
    """Replaces each rank's part of its replica's mean gradient by the same part of the aggregate.

    What is in ``parameter.grad`` after the last backward of a step is sent, in the same blocks on all ranks, of which
    some may have no columns. A parameter that no rank has used takes no part in the step.

    Args:
        engine: aggregates the blocks.
        layout: the parameters.

    """

    def __init__(self, engine: AggregationEngine, layout: ShardLayout) -> None:
        self._engine = engine
        self._layout = layout
        self._starts = {name: layout.start(name) for name in layout.parameters}

    @torch.no_grad()
    def aggregate(self) -> None:
        """Aggregate all gradients."""
        trainable = {name: parameter for name, parameter in self._layout.parameters.items() if parameter.requires_grad}
        sent = {name: self._sent(name, parameter) for name, parameter in trainable.items()}
        blocks = [self._block({name: sent[name] for name in names}) for names in _grouped(trainable)]
        for block in blocks:
            self._engine.send(block)
        self._engine.aggregate({name for name, parameter in trainable.items() if parameter.grad is not None})
        for block in blocks:
            for name, result in block.parts(block.buffer):
                self._receive(name, trainable[name], result)

    def _sent(self, name: str, parameter: nn.Parameter) -> Tensor:
        if parameter.grad is None:
            return torch.zeros_like(self._layout.part(name, parameter.detach()))
        return self._layout.part(name, parameter.grad)

    def _block(self, gradients: dict[str, Tensor]) -> GradientBlock:
        sizes = [gradient.numel() for gradient in gradients.values()]
        # A single one in place.
        buffer = torch.cat(list(gradients.values())) if len(gradients) > 1 else next(iter(gradients.values()))
        starts = {name: self._starts[name] for name in gradients}
        return GradientBlock(tuple(gradients), sizes, buffer, starts)

    def _receive(self, name: str, parameter: nn.Parameter, result: Tensor) -> None:
        if parameter.grad is None:  # used in another replica
            parameter.grad = torch.zeros_like(parameter)
        local = self._layout.local(parameter.grad)
        if self._layout.has_part(name) and local.data_ptr() != result.data_ptr():
            local.copy_(result.view_as(local))
        self._layout.spread(name, local)


def _grouped(parameters: Mapping[str, Tensor]) -> Iterable[list[str]]:
    """Yield the names of each block: one large parameter, or neighbours of the same dtype. The same on all ranks."""
    group: list[str] = []
    size = 0
    for name, parameter in parameters.items():
        is_full = size + parameter.numel() > _LARGE
        if group and (is_full or parameters[group[0]].dtype != parameter.dtype):
            yield group
            group, size = [], 0
        group.append(name)
        size += parameter.numel()
    if group:
        yield group
