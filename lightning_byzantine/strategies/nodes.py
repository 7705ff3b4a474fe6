"""What goes with nodes as workers."""

from typing import Any

from lightning.fabric.utilities.exceptions import MisconfigurationException

from lightning_byzantine.aggregators import Aggregator
from lightning_byzantine.estimators import Estimator
from lightning_byzantine.optim import DoubleMomentumEstimator

__all__ = ["check_arguments", "check_estimator", "check_num_nodes"]

_RANK = "or use workers='rank'."


def check_arguments(aggregator: Aggregator, others: dict[str, Any]) -> None:
    """Raise unless a strategy's arguments go with ``workers="node"``.

    Args:
        aggregator: the rule.
        others: those that must have their defaults, by name, or be 0 or False.

    Raises:
        MisconfigurationException: names the argument.

    """
    reasons = {
        "workers_per_process": "makes several workers of a process",
        "shadow": "averages over all ranks at once",
        "check_consistency_every_n_steps": "compares momentum, of which ranks of a node hold different parts",
    }
    for name, reason in reasons.items():
        if others[name]:
            raise MisconfigurationException(
                f"workers='node' makes one worker of several processes, and can't go with `{name}`, which {reason}, got"
                f" {name}={others[name]!r}. Leave it out, {_RANK}"
            )
    if aggregator.uses_previous:
        raise MisconfigurationException(
            "workers='node' can't go with a rule that starts from the previous aggregate, of which checkpoints would"
            f" hold one part, got {aggregator!r}. Use another rule, such as PersistentFilter(), {_RANK}"
        )


def check_estimator(estimator: Estimator | None) -> None:
    """Raise unless the estimator works on the mean of a node.

    Raises:
        MisconfigurationException: for that of double momentum.

    """
    if isinstance(estimator, DoubleMomentumEstimator):
        raise MisconfigurationException(
            "workers='node' can't go with double momentum, whose second gradient would be that of one process, got"
            f" {type(estimator).__name__}. Use WorkerMomentum(), {_RANK}"
        )


def check_num_nodes(num_nodes: int, num_ranks: int) -> None:
    """Raise unless nodes can be workers.

    Raises:
        MisconfigurationException: if there is one node only.
        ValueError: if nodes differ in their number of processes.

    """
    if num_nodes == 1:
        raise MisconfigurationException(
            "workers='node' makes a single worker of each node, which can't outvote itself, got num_nodes=1. Use more"
            f" nodes, {_RANK}"
        )
    if num_ranks % num_nodes:
        raise ValueError(
            f"workers='node' needs as many processes on each node, got {num_ranks} processes on {num_nodes} nodes"
        )
