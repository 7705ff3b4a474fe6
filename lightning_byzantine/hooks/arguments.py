"""What all hooks do with their arguments."""

import warnings
from copy import deepcopy
from typing import Literal

import torch.distributed as dist

from lightning_byzantine.aggregation.defaults import aggregator_or_default, estimator_or_default
from lightning_byzantine.aggregators import Aggregator
from lightning_byzantine.estimators import Estimator
from lightning_byzantine.exchange import EXCHANGES
from lightning_byzantine.optim import DoubleMomentumEstimator
from lightning_byzantine.utilities.checks import check_choice, check_positive

__all__ = ["check_arguments", "own_copies", "warn_of_two"]


def check_arguments(
    aggregator: Aggregator | None,
    estimator: Estimator | Literal["auto"] | None,
    exchange: str,
    max_worker_grad_norm: float | None,
    on_breakdown: str,
) -> None:
    """Raise what hooks would, as far as that is known before there are processes or a model."""
    aggregator_or_default(aggregator)
    if isinstance(estimator, DoubleMomentumEstimator):
        raise ValueError(
            "estimator must need one gradient of a batch only, got DoubleMomentumEstimator, which needs another one at"
            " a second point. Use WorkerMomentum(), or the Trainer with `byzantine_ddp_double_momentum`."
        )
    estimator_or_default(estimator)
    check_choice("exchange", exchange, EXCHANGES)
    if max_worker_grad_norm is not None:
        check_positive("max_worker_grad_norm", max_worker_grad_norm)
    if on_breakdown == "skip":
        raise ValueError(
            "on_breakdown must be 'raise' or 'propagate', got 'skip', for which the hook would need your optimizer. A"
            " torch.amp.GradScaler given as `scaler` skips such steps, with `init_scale=1.0` too."
        )
    check_choice("on_breakdown", on_breakdown, ("raise", "propagate"))


def own_copies(
    aggregator: Aggregator | None, estimator: Estimator | Literal["auto"] | None
) -> tuple[Aggregator, Estimator | None]:
    """Return the rule and the estimator of one model, in their first state, which no other model shares."""
    rule, own = deepcopy(aggregator_or_default(aggregator)), deepcopy(estimator_or_default(estimator))
    rule.reset()
    if own is not None:
        own.reset()
    return rule, own


def warn_of_two(function: str, num_workers: int) -> None:
    """Warn, on rank 0, if two workers can't outvote each other."""
    if num_workers == 2 and dist.get_rank() == 0:
        warnings.warn(
            f"Two workers cannot outvote each other: {function} withstands f < m / 2 Byzantine workers, which is f=0"
            " with 2 workers. Use 3 workers or more.",
            stacklevel=3,
        )
