"""The workers' states where each rank of a worker holds a part of its state."""

from dataclasses import dataclass
from typing import Any, Protocol

from torch import Tensor
from torch.distributed import ProcessGroup
from typing_extensions import override

from lightning_byzantine.aggregation.worker_states import WorkerStates
from lightning_byzantine.exchange import Shards

__all__ = ["DividedStates", "Layout"]


class Layout(Protocol):
    """Says which part [n] of a parameter's vector [d] this rank holds."""

    def num_columns(self, name: str) -> int:
        """Return n."""

    def whole(self, name: str, part: Tensor) -> Tensor:
        """Return the whole vector [d], on every rank of the worker, which all call this."""

    def part_of_whole(self, name: str, whole: Tensor) -> Tensor:
        """Return this rank's part [n] of a whole vector [d]."""


@dataclass(frozen=True)
class DividedStates(WorkerStates):
    """Saves the states as whole tensors, as of workers that are a single rank.

    Args:
        layout: which part of each parameter this rank holds.
        shards: the ranks.

    """

    layout: Layout
    shards: Shards

    @override
    def save(self, *, alone: bool) -> dict[str, Any]:
        if alone:  # the others of its worker have the rest
            return self.settings() | {"shared": {}, "workers": {}}
        return super().save(alone=False)

    @override
    def whole(self, state: dict[str, Tensor]) -> dict[str, Tensor]:
        wholes = {name: self.layout.whole(name, state[name]) for name in self.parameters if name in state}
        return wholes | self._numbers(state)

    @override
    def part(self, state: dict[str, Tensor]) -> dict[str, Tensor]:
        parts = {
            name: self.layout.part_of_whole(name, state[name].to(self.device))
            for name in self.parameters
            if name in state
        }
        return parts | self._numbers(state)

    @property
    @override
    def group(self) -> ProcessGroup:
        return self.shards.across

    @override
    def size(self, name: str) -> int:
        return self.layout.num_columns(name)

    def _numbers(self, state: dict[str, Tensor]) -> dict[str, Tensor]:
        """Return what in the state is of no parameter."""
        return {name: value for name, value in state.items() if name not in self.parameters}
