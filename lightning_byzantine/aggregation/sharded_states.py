"""The workers' states of models that are divided among the ranks of each worker."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.distributed.checkpoint.filesystem import FileSystemReader
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.state_dict_saver import save

from lightning_byzantine.aggregation.divided_states import DividedStates
from lightning_byzantine.aggregation.shard_layout import ShardLayout

__all__ = ["ShardedStates"]

_SHARED = "shared"


@dataclass(frozen=True)
class ShardedStates(DividedStates):
    """Saves the states as whole tensors, as of models that are not divided, or each rank's part in a folder.

    Args:
        layout: the parameters.

    """

    layout: ShardLayout

    def save_parts(self, folder: Path) -> dict[str, Any]:
        """Write all ranks' parts as a distributed checkpoint; must be called on all ranks.

        Returns:
            The rest of the state.

        """
        shared = self.shared()
        parts = {f"{_SHARED}.{name}": value for name, value in self._sharded(shared).items()}
        for worker, own in zip(self.own_workers, self.own(), strict=False):
            parts |= {f"{worker}.{name}": value for name, value in self._sharded(own).items()}
        save(parts, checkpoint_id=folder)
        return self.settings() | {"numbers": self._numbers(shared)}

    def load_parts(self, folder: Path, saved: dict[str, Any]) -> None:
        """Restore what :meth:`save_parts` has written, on any number of ranks for each worker.

        Raises:
            ValueError: as :meth:`load` does.

        """
        self.load_settings(saved)
        if self.estimator is None:
            return
        names = FileSystemReader(folder).read_metadata().state_dict_metadata
        states = {prefix: self._empty(prefix, names) for prefix in (_SHARED, *map(str, self.own_workers))}
        flat = {f"{prefix}.{name}": value for prefix, state in states.items() for name, value in state.items()}
        load(flat, checkpoint_id=folder)
        shared, *own = (self._parts(state) for state in states.values())
        self.estimator.load_state(own, shared | saved["numbers"])

    def _sharded(self, state: dict[str, Tensor]) -> dict[str, Tensor]:
        return {name: self.layout.sharded(name, state[name]) for name in self.parameters if name in state}

    def _parts(self, state: dict[str, Tensor]) -> dict[str, Tensor]:
        return {name: self.layout.part(name, value) for name, value in state.items()}

    def _empty(self, prefix: str, names: dict[str, Any]) -> dict[str, Tensor]:
        """Return memory for what the checkpoint has with this prefix."""
        found = {name: names.get(f"{prefix}.{name}") for name in self.parameters}
        dtypes = {name: tensor.properties.dtype for name, tensor in found.items() if tensor is not None}
        zeros = {name: torch.zeros(self.size(name), dtype=dtype) for name, dtype in dtypes.items()}
        return self._sharded(zeros)
