"""Errors in a rank's own training step, which cost that rank its vote and nobody else anything."""

import traceback
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from torch import Tensor, nn

__all__ = ["WorkerErrors"]


class WorkerErrors:
    """Turns what ``training_step`` raises into a loss whose gradient is not finite, and so into a row that is dropped.

    The rank goes on to backward, as all others wait for it there.

    Args:
        module: the module that is trained.

    Attributes:
        count: how many steps have failed on this rank.
        last: what went wrong last, and where.

    Raises:
        MisconfigurationException: if the module optimizes manually, or a training step has collectives, in which the
            others would wait for a rank that has failed before it came to them.

    """

    def __init__(self, module: pl.LightningModule) -> None:
        if not module.automatic_optimization:
            raise MisconfigurationException(
                "on_worker_error='exclude' gives a failed `training_step` another loss, which needs automatic"
                " optimization, got automatic_optimization=False. Use on_worker_error='raise'."
            )
        if any(isinstance(part, nn.SyncBatchNorm) for part in module.modules()):
            raise MisconfigurationException(
                "SyncBatchNorm communicates within `training_step`, where others would wait for a failed rank. Use"
                " BatchNorm, or on_worker_error='raise'."
            )
        self.count = 0
        self.last = ""
        self._module = module

    @contextmanager
    def excluded(self) -> Iterator[None]:
        """Have the module's training step give a non-finite loss within this block, instead of raising."""
        patched, training_step = vars(self._module), self._module.training_step
        own = {name: patched[name] for name in ("training_step",) if name in patched}  # the user's patch, as of compile

        def guarded(*args: Any, **kwargs: Any) -> Any:
            try:
                output = training_step(*args, **kwargs)
            except MisconfigurationException:
                raise
            except Exception as error:
                self._report(error)
                return _non_finite_loss(self._module)
            self._check_logged()
            return output

        patched["training_step"] = guarded
        try:
            yield
        finally:
            patched.pop("training_step", None)
            patched.update(own)

    def _report(self, error: Exception) -> None:
        place = traceback.extract_tb(error.__traceback__)[-1]
        self.count += 1
        self.last = f"{type(error).__name__}: {error} ({place.filename}:{place.lineno})"
        warnings.warn(
            f"Rank {self._module.global_rank} failed in its training step at batch"
            f" {self._module.trainer.fit_loop.batch_idx}, so its gradient is left out of that step;"
            f" {self.count} failures so far. {self.last}",
            stacklevel=2,
        )

    def _check_logged(self) -> None:
        results = self._module.trainer._results
        for metric in (results or {}).values():
            if metric.meta.fx == "training_step" and metric.meta.sync.should:
                raise MisconfigurationException(
                    f"self.log({metric.meta.name!r}, sync_dist=True) in `training_step` communicates, and others would"
                    " wait there for a failed rank. Log it without sync_dist, or use on_worker_error='raise'."
                )


def _non_finite_loss(module: nn.Module) -> Tensor:
    # Of all parameters, for DDP to wait for no gradient in vain.
    sums = [parameter.float().sum() for parameter in module.parameters() if parameter.requires_grad]
    return torch.stack(sums).sum() * torch.nan
