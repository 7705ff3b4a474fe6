"""Wraps a module's optimizer in double momentum."""

from inspect import signature

import lightning.pytorch as pl
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.plugins.precision import MixedPrecision, Precision
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn
from lightning.pytorch.utilities.model_helpers import is_overridden
from torch import nn
from torch.optim import Optimizer

from lightning_byzantine.estimators import Estimator
from lightning_byzantine.estimators.schedule import Schedule
from lightning_byzantine.optim import DoubleMomentum, DoubleMomentumEstimator

__all__ = ["find_or_wrap"]


def find_or_wrap(
    module: pl.LightningModule, optimizers: list[Optimizer], estimator: Estimator | str | None, precision: Precision
) -> DoubleMomentum | None:
    """Return the module's optimizer, wrapped in :class:`DoubleMomentum`; None if double momentum is not used.

    An optimizer that ``configure_optimizers`` has wrapped already is returned as it is.

    Args:
        module: the module to train.
        optimizers: the result of ``configure_optimizers``.
        estimator: the strategy's argument.
        precision: the Trainer's precision plugin.

    Raises:
        MisconfigurationException: if the strategy was given another estimator than the optimizer needs, or if the
            module has no optimizer, optimizes manually, fetches its own batches, or overrides ``backward``.

    """
    wrapped = [optimizer for optimizer in optimizers if isinstance(optimizer, DoubleMomentum)]
    if wrapped and estimator != "auto" and not isinstance(estimator, DoubleMomentumEstimator):
        raise MisconfigurationException(
            "A worker sends one estimate only, but `configure_optimizers` returned DoubleMomentum and the strategy has"
            f" estimator={estimator!r}. Remove one of them."
        )
    own = wrapped[0].estimator if wrapped else estimator
    if not isinstance(own, DoubleMomentumEstimator):
        return None
    _check(module, precision, own.schedule)
    # Only the first one: automatic optimization has no more.
    if wrapped:
        if isinstance(estimator, DoubleMomentumEstimator) and repr(estimator) != repr(own):
            rank_zero_info(f"Kept the optimizer's own {own!r} instead of the strategy's {estimator!r}.")
        return wrapped[0]
    if not optimizers[0].param_groups:
        raise MisconfigurationException("Double momentum needs an optimizer, got none from `configure_optimizers`.")
    base = optimizers[0]
    optimizer = DoubleMomentum.around(base, own)
    # Schedulers refer to the base already, and LearningRateMonitor would log the base and its wrapper if it did not
    # find the base by this name. LightningOptimizer has a property of that name, which takes precedence.
    optimizer.optimizer = base  # type: ignore[attr-defined]
    rank_zero_info(f"Wrapped {type(base).__name__} in DoubleMomentum, for {own!r}.")
    return optimizer


def _check(module: pl.LightningModule, precision: Precision, schedule: Schedule) -> None:
    """Raise if the module's gradient at a second point can't be computed; warn about costs in time or precision."""
    if not module.automatic_optimization:
        raise MisconfigurationException(
            "Double momentum needs automatic optimization, got automatic_optimization=False. Use"
            " `strategy='byzantine_ddp'`, whose worker momentum works with manual optimization."
        )
    if "dataloader_iter" in signature(module.training_step).parameters:
        raise MisconfigurationException(
            "Double momentum runs `training_step` twice on each batch, got a `training_step(dataloader_iter)` that"
            " fetches its own. Take `batch` instead."
        )
    if is_overridden("backward", module):
        raise MisconfigurationException(
            "Double momentum takes the gradient of the loss that `training_step` returns, got a module that overrides"
            f" `{type(module).__name__}.backward`. Use `strategy='byzantine_ddp'`, or make it part of the loss."
        )
    if any(isinstance(part, nn.SyncBatchNorm) for part in module.modules()):
        rank_zero_warn("SyncBatchNorm communicates twice a step under double momentum.")
    bfloat16 = isinstance(precision, MixedPrecision) and precision.precision == "bf16-mixed"
    if bfloat16 and schedule.lowest_beta < 0.05:
        rank_zero_warn(
            "Under precision='bf16-mixed', rounding builds up in double momentum while beta_t goes to"
            f" {schedule.lowest_beta}. Set beta=0.05 or more, or min_beta=0.05."
        )
