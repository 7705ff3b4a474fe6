"""The workers' states, which differ between ranks, gathered into one checkpoint."""

import warnings
from dataclasses import dataclass
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed import ProcessGroup

from lightning_byzantine.aggregation.gradients import flat_size
from lightning_byzantine.aggregators import Aggregator
from lightning_byzantine.estimators import Estimator
from lightning_byzantine.exchange.collectives import gather, gather_to_first

__all__ = ["WorkerStates"]


@dataclass(frozen=True)
class WorkerStates:
    """Converts the state of all workers' estimators and of the rule to plain tensors, and back.

    Args:
        parameters: the parameters that estimators may have state of, by name, in the same order on every rank.
        aggregator: the rule.
        estimator: this rank's estimator.
        own_workers: the workers that this rank acts as.
        num_workers: number of all ranks' workers, m.
        device: where this rank trains.
        remedy: a sentence on how to go on without the saved state.

    """

    parameters: dict[str, nn.Parameter]
    aggregator: Aggregator
    estimator: Estimator | None
    own_workers: range
    num_workers: int
    device: torch.device
    remedy: str

    def save(self, *, alone: bool) -> dict[str, Any]:
        """Return the state for the checkpoint; complete on rank 0, which writes it.

        Args:
            alone: whether other ranks may not be saving as well. If so, only this rank's workers are included, and what
                they share if they are all.

        """
        state = self.settings() | {"shared": {}, "workers": {}}
        if self.estimator is not None:
            own = self.own()
            has_all = len(own) == self.num_workers
            gathered = alone or has_all
            wholes = dict(zip(self.own_workers, map(self.whole, own), strict=True)) if gathered else self._gather(own)
            state["workers"] = wholes
            if has_all or not alone:
                state["shared"] = self.whole(self.shared())
        return state

    def settings(self) -> dict[str, Any]:
        """Return the rule's state, and what must be the same on resume."""
        return {
            "num_workers": self.num_workers,
            "aggregator": self.aggregator.state_dict(),
            "estimator": repr(self.estimator),
        }

    def shared(self) -> dict[str, Tensor]:
        """Return the part of the estimator's state that is the same for all workers; must be called on all ranks."""
        return {} if self.estimator is None else self.estimator.shared_state()

    def own(self) -> list[dict[str, Tensor]]:
        """Return the part of the estimator's state that each of this rank's workers has."""
        return (
            []
            if self.estimator is None
            else [self.estimator.worker_state(worker) for worker in range(len(self.own_workers))]
        )

    def whole(self, state: dict[str, Tensor]) -> dict[str, Tensor]:
        """Return the state of whole parameters, given this rank's part of them: here the same."""
        return state

    def part(self, state: dict[str, Tensor]) -> dict[str, Tensor]:
        """Return this rank's part, on its device, of the state of whole parameters."""
        return {name: value.to(self.device) for name, value in state.items()}

    @property
    def group(self) -> ProcessGroup | None:
        """The ranks that have one worker each, or several; None for all ranks."""
        return None

    def load(self, state: dict[str, Any]) -> None:
        """Restore what :meth:`save` returned.

        Raises:
            ValueError: if the checkpoint is of another number of workers, another estimator, or a rule with other
                state.

        """
        self.load_settings(state)
        if self.aggregator.uses_previous and "previous" in state:  # where checkpoints of before had it
            self.aggregator.last_aggregate.keep_parts(self.part(state["previous"]))
        if self.estimator is None:
            return
        if len(state["workers"]) != self.num_workers:
            self.estimator.reset()
            if self.own_workers.start == 0:
                warnings.warn(
                    "The checkpoint was written while its run was being interrupted: it holds"
                    f" {len(state['workers'])} of {self.num_workers} workers' states, so all estimators start from"
                    " zero.",
                    stacklevel=3,
                )
            return
        own = [self.part(state["workers"][worker]) for worker in self.own_workers]
        self.estimator.load_state(own, self.part(state["shared"]))

    def load_settings(self, state: dict[str, Any]) -> None:
        """Restore the rule's state.

        Raises:
            ValueError: as :meth:`load` does.

        """
        self._check("number of workers", state["num_workers"], self.num_workers)
        self._check("estimator", state["estimator"], repr(self.estimator))
        self._check("state of the aggregator", sorted(state["aggregator"]), sorted(self.aggregator.state_dict()))
        self.aggregator.load_state_dict(state["aggregator"])

    def _check(self, what: str, saved: Any, current: Any) -> None:
        if saved != current:
            raise ValueError(
                f"The checkpoint and this run differ in the {what}: {saved} in the checkpoint, {current} now. Resume"
                f" with what the checkpoint has, or {self.remedy}"
            )

    def _gather(self, own: list[dict[str, Tensor]]) -> dict[int, dict[str, Tensor]]:
        """Gather states on rank 0. A worker that was dropped since its first step has none for a parameter."""
        workers: dict[int, dict[str, Tensor]] = {worker: {} for worker in range(self.num_workers)}
        # On all ranks, so that they gather the same parameters even if one of them reports wrongly.
        known = torch.tensor([[name in state for name in self.parameters] for state in own], dtype=torch.uint8)
        gathered = gather(known.flatten().to(self.device), self.group)
        present = torch.stack(gathered).view(self.num_workers, len(self.parameters))
        for index, (name, parameter) in enumerate(self.parameters.items()):
            if not present[:, index].any():
                continue
            zeros = torch.zeros(self.size(name), dtype=torch.promote_types(parameter.dtype.to_real(), torch.float32))
            wholes = [self.whole({name: state.get(name, zeros).to(self.device)}) for state in own]
            values = torch.stack([whole[name] for whole in wholes])
            for worker, row in enumerate(chain.from_iterable(gather_to_first(values, self.group) or [])):
                if present[worker, index]:
                    workers[worker][name] = row
        return workers

    def size(self, name: str) -> int:
        """Return the number of elements of this rank's part of a parameter's state."""
        return flat_size(self.parameters[name])
