"""The gradients of a second pass, which DDP does not see."""

from collections.abc import Mapping
from typing import Any

import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import LightningModule
from torch import Tensor

from lightning_byzantine.aggregation.gradients import flattened, unscaled

__all__ = ["gradients_of"]


def gradients_of(module: LightningModule, output: Any, num_batches: int, loss_scale: float | None) -> dict[str, Tensor]:
    """Return the gradients of a training step's loss by parameter name, flat, and without the loss scale.

    ``parameter.grad`` stays as it is, and so do the gradients that DDP is about to exchange.

    Args:
        module: the module, at the point of the gradient.
        output: what its ``training_step`` returned.
        num_batches: number of batches that a worker averages over; the result is its share of the average.
        loss_scale: the factor on the loss; None without a gradient scaler.

    Returns:
        [n] in float32 or float64; parameters that have no gradient are missing.

    Raises:
        MisconfigurationException: if the graph contains a reentrant checkpoint.

    """
    loss = output["loss"] if isinstance(output, Mapping) else output
    if loss is None:
        return {}  # Lightning warns of it, or raises, after the ordinary pass
    parameters = {name: value for name, value in module.named_parameters() if value.requires_grad}
    # As in the ordinary pass, where backward runs outside of autocast.
    with torch.autocast(module.device.type, enabled=False):
        loss = loss / num_batches * (1.0 if loss_scale is None else loss_scale)
        gradients = _differentiated(loss, list(parameters.values()))
    return {
        name: unscaled(flattened(gradient, parameters[name]), loss_scale)
        for name, gradient in zip(parameters, gradients, strict=True)
        if gradient is not None
    }


def _differentiated(loss: Tensor, parameters: list[Tensor]) -> tuple[Tensor | None, ...]:
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
            "A second pass can't compute gradients through `torch.utils.checkpoint` with use_reentrant=True. Use"
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
