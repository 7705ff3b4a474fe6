"""Defaults and checks of the arguments with which training is made robust, whoever runs the loop."""

from typing import Literal

from lightning_byzantine.aggregators import Aggregator, PersistentFilter
from lightning_byzantine.estimators import Estimator, WorkerMomentum

__all__ = ["aggregator_or_default", "estimator_or_default", "num_byzantine_or_default"]


def aggregator_or_default(aggregator: Aggregator | None) -> Aggregator:
    """Return the rule; a new ``PersistentFilter()`` for None.

    Raises:
        TypeError: if it is no rule.

    Example:
        >>> aggregator_or_default(None)
        PersistentFilter()

    """
    if aggregator is None:
        return PersistentFilter()
    if not isinstance(aggregator, Aggregator):
        raise TypeError(f"aggregator must be an Aggregator, such as Krum(), got {aggregator!r}")
    return aggregator


def estimator_or_default(estimator: Estimator | Literal["auto"] | None) -> Estimator | None:
    """Return the estimator; a new ``WorkerMomentum()`` for "auto".

    Raises:
        TypeError: if it is no estimator.

    Example:
        >>> estimator_or_default("auto")
        WorkerMomentum(beta=0.9, transparent=True)

    """
    if estimator == "auto":
        return WorkerMomentum()
    if not isinstance(estimator, Estimator | None):
        raise TypeError(f"estimator must be an Estimator, 'auto' or None, got {estimator!r}")
    return estimator


def num_byzantine_or_default(num_byzantine: int | None, num_workers: int) -> int:
    """Return f; the largest one that is under half of the workers for None.

    Example:
        >>> num_byzantine_or_default(None, num_workers=8)
        3

    """
    return (num_workers - 1) // 2 if num_byzantine is None else num_byzantine
