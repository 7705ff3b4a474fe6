"""Exceptions in one rank's training step, which exclude its gradient instead of ending the run."""

import traceback
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from torch import Tensor, nn

from lightning_byzantine.strategies.lightning_internals import results_of
from lightning_byzantine.utilities.replacing import replaced

__all__ = ["WorkerErrors"]


class WorkerErrors:
    """Replaces the loss of a failed ``training_step`` by one with a non-finite gradient, whose row is then dropped.

    So the rank continues with backward, where all others wait for it. A step that returns None, or a loss without a
    graph, has failed too, because nothing would be sent.

    Args:
        module: the module to train.

    Attributes:
        count: number of failed steps on this rank.
        last: what was wrong with the last, and where an error was raised.

    Raises:
        MisconfigurationException: if the module optimizes manually, or its training step contains collectives, in
            which the other ranks would wait for one that failed before.

    """

    def __init__(self, module: pl.LightningModule) -> None:
        if not module.automatic_optimization:
            raise MisconfigurationException(
                "on_worker_error='exclude' replaces the loss of a failed `training_step`, which needs automatic"
                " optimization, got automatic_optimization=False. Use on_worker_error='raise'."
            )
        if any(isinstance(part, nn.SyncBatchNorm) for part in module.modules()):
            raise MisconfigurationException(
                "SyncBatchNorm communicates within `training_step`, where other ranks would wait for a failed one. Use"
                " BatchNorm, or on_worker_error='raise'."
            )
        self.count = 0
        self.last = ""
        self._module = module

    @contextmanager
    def excluded(self) -> Iterator[None]:
        """Let the module's training step return a non-finite loss within the block, instead of raising."""
        training_step = self._module.training_step

        def guarded(*args: Any, **kwargs: Any) -> Any:
            try:
                output = training_step(*args, **kwargs)
            except MisconfigurationException:
                raise
            except Exception as error:
                place = traceback.extract_tb(error.__traceback__)[-1]
                self._report(f"{type(error).__name__}: {error} ({place.filename}:{place.lineno})")
                return _non_finite_loss(self._module)
            self._check_logged()
            loss = output.get("loss", output) if isinstance(output, Mapping) else output
            if loss is None or (isinstance(loss, Tensor) and not loss.requires_grad):
                self._report("`training_step` returned " + ("None." if loss is None else "a loss without a graph."))
                return _non_finite_loss(self._module)
            return output

        with replaced(self._module, training_step=guarded):
            yield

    def _report(self, what: str) -> None:
        self.count += 1
        self.last = what
        warnings.warn(
            f"Rank {self._module.global_rank} failed in its training step at batch"
            f" {self._module.trainer.fit_loop.batch_idx}, so its gradient is excluded from that step;"
            f" {self.count} failures so far. {self.last}",
            stacklevel=2,
        )

    def _check_logged(self) -> None:
        for metric in (results_of(self._module.trainer) or {}).values():
            if metric.meta.fx == "training_step" and metric.meta.sync.should:
                raise MisconfigurationException(
                    f"self.log({metric.meta.name!r}, sync_dist=True) in `training_step` communicates, and other ranks"
                    " would wait there for a failed one. Log it without sync_dist, or use on_worker_error='raise'."
                )


def _non_finite_loss(module: nn.Module) -> Tensor:
    # Depends on all parameters, because DDP waits for the gradient of each.
    sums = [parameter.abs().float().sum() for parameter in module.parameters() if parameter.requires_grad]
    return torch.stack(sums).sum() * torch.nan
