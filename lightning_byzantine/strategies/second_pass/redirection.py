"""The training step at the previous query point, before each ordinary one."""

from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any

import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import LightningModule
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from typing_extensions import override

from lightning_byzantine.aggregation.gradients import clipping_factor, flattened, unscaled
from lightning_byzantine.optim import DoubleMomentum
from lightning_byzantine.strategies.accumulation_window import AccumulationWindow
from lightning_byzantine.strategies.lightning_internals import _DDPForwardRedirection, skips_backward
from lightning_byzantine.strategies.second_pass.isolation import isolated
from lightning_byzantine.utilities.replacing import replaced

__all__ = ["PreviousPointRedirection"]


@dataclass(eq=False)
class PreviousPointRedirection(_DDPForwardRedirection):
    """Runs ``training_step`` at x_{t-1} first, for the gradient g~_t alone, and then as Lightning does.

    Both run within DDP's forward, after DDP has synchronized buffers and before it prepares its backward. With
    ``accumulate_grad_batches``, gradients are summed over the batches of one optimizer step, for each worker that this
    process acts as.

    Args:
        optimizer: holds x_{t-1}, and its estimator takes g~_t.
        max_norm: clips g~_t to this norm; None for no clipping.
        loss_scale: returns the factor on the loss; None without a gradient scaler.
        window: which batches belong to the current optimizer step.

    """

    optimizer: DoubleMomentum
    max_norm: float | None
    loss_scale: Callable[[], float | None]
    window: AccumulationWindow
    _sums: list[dict[str, Tensor]] = field(default_factory=list, init=False)

    @override
    def __call__(
        self, wrapper_module: nn.Module, original_module: LightningModule, method_name: str, *args: Any, **kwargs: Any
    ) -> Any:
        if method_name != "training_step" or skips_backward(original_module.trainer):
            return super().__call__(wrapper_module, original_module, method_name, *args, **kwargs)
        training_step, replacement = original_module.training_step, ExitStack()

        def both_passes(*args: Any, **kwargs: Any) -> Any:
            replacement.close()  # before the step, which then runs on the module's own method
            assert isinstance(wrapper_module, DistributedDataParallel)
            self._collect(original_module, training_step, args, kwargs)
            if wrapper_module.require_backward_grad_sync:
                self.optimizer.estimator.begin(*map(self._clipped, self._sums))
            return training_step(*args, **kwargs)

        with replacement:
            replacement.enter_context(replaced(original_module, training_step=both_passes))
            return super().__call__(wrapper_module, original_module, method_name, *args, **kwargs)

    def _collect(
        self, module: LightningModule, training_step: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> None:
        if self.window.position == 0:
            self._sums = [{} for _ in range(self.window.num_local_workers)]
        # In the same steps on all ranks, because a training step may contain collectives.
        if self.optimizer.estimator.step > 1:
            with isolated(module, (args, kwargs)), self.optimizer.swapped_to_previous_point():
                gradients = self._gradients(module, training_step(*args, **kwargs))
            total = self._sums[self.window.worker]
            for name, gradient in gradients.items():
                total[name] = total[name] + gradient if name in total else gradient

    def _clipped(self, gradients: dict[str, Tensor]) -> dict[str, Tensor]:
        if self.max_norm is None:
            return gradients
        factor = clipping_factor(list(gradients.values()), self.max_norm)
        return {name: gradient * factor for name, gradient in gradients.items()}

    def _gradients(self, module: LightningModule, output: Any) -> dict[str, Tensor]:
        """Return the gradients of the training step's loss, flat and without the loss scale."""
        loss = output["loss"] if isinstance(output, Mapping) else output
        if loss is None:
            return {}  # Lightning warns of it, or raises, after the ordinary pass
        scale = self.loss_scale()
        parameters = {name: value for name, value in module.named_parameters() if value.requires_grad}
        # As in the ordinary pass, where backward runs outside of autocast.
        with torch.autocast(module.device.type, enabled=False):
            loss = loss / self.window.batches_of_a_worker * (1.0 if scale is None else scale)
            gradients = _gradients_of(loss, list(parameters.values()))
        return {
            name: unscaled(flattened(gradient, parameters[name]), scale)
            for name, gradient in zip(parameters, gradients, strict=True)
            if gradient is not None
        }


def _gradients_of(loss: Tensor, parameters: list[Tensor]) -> tuple[Tensor | None, ...]:
    reason: Exception | None = None
    try:
        gradients = torch.autograd.grad(loss, parameters, allow_unused=True)
    except RuntimeError as error:
        if "use_reentrant" not in str(error):
            raise
        reason = error
    # torch raises only if an input of the checkpoint needs a gradient; otherwise it returns None.
    if reason is not None or (any(gradient is None for gradient in gradients) and _has_reentrant_checkpoint(loss)):
        raise MisconfigurationException(
            "Double momentum can't compute gradients through `torch.utils.checkpoint` with use_reentrant=True. Use"
            " use_reentrant=False."
        ) from reason
    return gradients


def _has_reentrant_checkpoint(loss: Tensor) -> bool:
    pending, seen = [loss.grad_fn], set()
    while pending:
        node = pending.pop()
        if node is None or node in seen:
            continue
        if node.name() == "CheckpointFunctionBackward":
            return True
        seen.add(node)
        pending.extend(following for following, _ in node.next_functions)
    return False
