"""The workers' states in a checkpoint: they differ from rank to rank, and a checkpoint is one file."""

from typing import Any

import torch
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor, nn

from lightning_byzantine.aggregators import Aggregator
from lightning_byzantine.estimators import Estimator
from lightning_byzantine.exchange import gather_to_first

__all__ = ["WorkerStates"]


class WorkerStates:
    """Collects the estimators of all workers, and the rule's own state, into plain tensors and back.

    Args:
        module: the module whose parameters the estimator knows by name.
        aggregator: the rule.
        estimator: this rank's estimator.
        rank: this rank.
        num_workers: number of ranks, m.

    """

    def __init__(
        self, module: nn.Module, aggregator: Aggregator, estimator: Estimator | None, rank: int, num_workers: int
    ) -> None:
        self._parameters = {name: p for name, p in module.named_parameters() if p.requires_grad}
        self._aggregator = aggregator
        self._estimator = estimator
        self._rank = rank
        self._num_workers = num_workers

    def save(self, *, alone: bool) -> dict[str, Any]:
        """Return the state for the checkpoint; complete on rank 0, which writes it.

        Args:
            alone: whether other ranks may not be saving too. Only this rank's estimator is included then.

        """
        state: dict[str, Any] = {
            "num_workers": self._num_workers,
            "aggregator": self._aggregator.state_dict(),
            "shared": {} if self._estimator is None else self._estimator.shared_state(),
            "workers": {},
        }
        if self._estimator is not None:
            own = self._estimator.worker_state()
            state["workers"] = {self._rank: own} if alone or self._num_workers == 1 else self._gather(own)
        return state

    def load(self, state: dict[str, Any]) -> None:
        """Continue from what :meth:`save` returned.

        Raises:
            ValueError: if the checkpoint is of another number of workers.

        """
        if state["num_workers"] != self._num_workers:
            raise ValueError(
                f"The checkpoint holds the estimators of {state['num_workers']} workers, but this run has"
                f" {self._num_workers}. Resume with devices * num_nodes = {state['num_workers']}, or start the"
                " estimators afresh with `ByzantineDDPStrategy(restart_estimator=True)`."
            )
        self._aggregator.load_state_dict(state["aggregator"])
        if self._estimator is None:
            return
        if len(state["workers"]) != self._num_workers:
            rank_zero_warn(
                f"The checkpoint was written while its run was being interrupted or without an estimator: it holds"
                f" {len(state['workers'])} of {self._num_workers} workers' states, so all estimators start afresh."
            )
            return
        worker = self._to_devices(state["workers"][self._rank])
        self._estimator.load_state(worker, self._to_devices(state["shared"]))

    def _gather(self, own: dict[str, Tensor]) -> dict[int, dict[str, Tensor]]:
        """Gather states on rank 0. A worker that was dropped since its first step has none for a parameter."""
        workers: dict[int, dict[str, Tensor]] = {rank: {} for rank in range(self._num_workers)}
        for name, parameter in self._parameters.items():
            empty = torch.zeros(
                parameter.numel(), dtype=torch.promote_types(parameter.dtype, torch.float32), device=parameter.device
            )
            has_state = gather_to_first(torch.tensor(name in own, dtype=torch.uint8, device=parameter.device))
            values = gather_to_first(own.get(name, empty))
            if has_state is not None and values is not None:
                for rank in range(self._num_workers):
                    if has_state[rank]:
                        workers[rank][name] = values[rank]
        return workers

    def _to_devices(self, state: dict[str, Tensor]) -> dict[str, Tensor]:
        return {name: value.to(self._parameters[name].device) for name, value in state.items()}
