"""Another worker's step, computed once more."""

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import lightning.pytorch as pl
import torch
from torch import Tensor

from lightning_byzantine.aggregation.gradients import clipped
from lightning_byzantine.optim import DoubleMomentum
from lightning_byzantine.strategies.audits.captured_step import CapturedBatch
from lightning_byzantine.strategies.second_pass.gradients import gradients_of
from lightning_byzantine.strategies.second_pass.isolation import isolated
from lightning_byzantine.strategies.second_pass.snapshot import Snapshot
from lightning_byzantine.utilities.rng import set_random_state

__all__ = ["Gradients", "NotReplayableError", "Replay"]


_FLOAT32, _TF32, _BFLOAT16 = torch.finfo(torch.float32).eps, 2.0**-10, torch.finfo(torch.bfloat16).eps
_EPS_OF_FLOAT32 = {"ieee": _FLOAT32, "none": _FLOAT32, "tf32": _TF32, "bf16": _BFLOAT16}


class NotReplayableError(Exception):
    """The training step can't be computed once more on this rank, whatever the batch."""


@dataclass
class Gradients:
    """What a worker computes in one step.

    Args:
        here: the gradient at the current parameters, [n] by parameter name.
        before: the gradient at the previous query point of double momentum; empty without.
        precision: the spacing of numbers around 1 in the dtype that it was computed in.

    """

    here: dict[str, Tensor] = field(default_factory=dict)
    before: dict[str, Tensor] = field(default_factory=dict)
    precision: float = 0.0


@dataclass
class Replay:
    """Computes gradients as the strategy does, and leaves no trace.

    Args:
        module: the module to train.
        optimizer: the one with the previous query point, under double momentum; None otherwise.
        max_norm: of a worker's gradient; None for no clipping.
        num_batches: number of batches that a worker averages over.
        loss_scale: factor on the loss; None without a gradient scaler.

    """

    module: pl.LightningModule
    optimizer: DoubleMomentum | None
    max_norm: float | None
    num_batches: int
    loss_scale: float | None

    def gradients(self, batches: Sequence[CapturedBatch]) -> Gradients:
        """Return the gradients of a worker whose step consists of these batches.

        Raises:
            NotReplayableError: if the module keeps what can't be restored, or the step needs other ranks.
            Exception: whatever ``training_step`` raises.

        """
        result = Gradients()
        if self.optimizer is not None and self.optimizer.estimator.step > 1:
            result.before = self._clipped(self._sum(batches, self.optimizer.swapped_to_previous_point(), result))
        result.here = self._clipped(self._sum(batches, nullcontext(), result))
        return result

    def _clipped(self, gradients: dict[str, Tensor]) -> dict[str, Tensor]:
        return gradients if self.max_norm is None else clipped(gradients, self.max_norm)

    def _sum(
        self, batches: Sequence[CapturedBatch], at_point: AbstractContextManager[None], result: Gradients
    ) -> dict[str, Tensor]:
        total: dict[str, Tensor] = {}
        with at_point:
            for batch in batches:
                for name, gradient in self._once(batch, result).items():
                    total[name] = total[name] + gradient if name in total else gradient
        return total

    def _once(self, batch: CapturedBatch, result: Gradients) -> dict[str, Tensor]:
        module = self.module
        now = Snapshot(module, copy_tensors=False, watch_arrays=False)
        try:
            batch.start.restore()  # such as a counter of steps
            arguments = batch.arguments()
            with (
                torch.enable_grad(),
                module.trainer.precision_plugin.train_step_context(),
                isolated(module, arguments, gather=_refuse_to_gather) as state,
            ):
                if state.iterators:
                    raise NotReplayableError("the module holds an iterator, which can't be restored")
                self._restore_state(batch)
                result.precision = max(result.precision, _precision(module))
                output = module.training_step(*arguments[0], **arguments[1])
                gradients = gradients_of(module, output, self.num_batches, self.loss_scale)
                if state.has_drawn:
                    raise NotReplayableError("the training step draws from a random generator of its own")
            return gradients
        finally:
            now.restore()

    def _restore_state(self, batch: CapturedBatch) -> None:
        set_random_state(self.module.device, batch.random)
        with torch.no_grad():
            for buffer, value in zip(self.module.buffers(), batch.buffers, strict=True):
                buffer.copy_(value)


def _refuse_to_gather(*args: Any, **kwargs: Any) -> Any:
    raise NotReplayableError("the training step gathers from other ranks")


def _precision(module: pl.LightningModule) -> float:
    """Return the spacing of numbers around 1 in the coarsest dtype of a step, TF32 included."""
    device = module.device.type
    dtypes = {parameter.dtype for parameter in module.parameters() if parameter.requires_grad}
    if torch.is_autocast_enabled(device):
        dtypes.add(torch.get_autocast_dtype(device))
    spacings = [torch.finfo(dtype).eps for dtype in dtypes]
    if torch.float32 in dtypes:
        spacings += [_EPS_OF_FLOAT32[precision] for precision in _precisions_of_float32(device)]
    return max(spacings)


def _precisions_of_float32(device: str) -> list[str]:
    """Return what products of float32 may be computed in: not the same on devices of different generations."""
    # Modules that torch replaces by objects.
    cudnn: Any = torch.backends.cudnn
    mkldnn: Any = torch.backends.mkldnn
    on_cuda, on_others = (torch.backends.cuda.matmul, cudnn.conv, cudnn.rnn), (mkldnn.matmul, mkldnn.conv, mkldnn.rnn)
    return [operation.fp32_precision for operation in (on_cuda if device == "cuda" else on_others)]
