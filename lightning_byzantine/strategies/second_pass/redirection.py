"""The training step at the previous query point, before each ordinary one."""

from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any

from lightning.pytorch import LightningModule
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from typing_extensions import override

from lightning_byzantine.aggregation.gradients import clipped
from lightning_byzantine.optim import DoubleMomentum
from lightning_byzantine.strategies.accumulation_window import AccumulationWindow
from lightning_byzantine.strategies.lightning_internals import _DDPForwardRedirection, skips_backward
from lightning_byzantine.strategies.second_pass.gradients import gradients_of
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
            with isolated(module, (args, kwargs)) as state, self.optimizer.swapped_to_previous_point():
                if state.iterators:
                    rank_zero_warn(
                        f"The module holds an iterator, a {type(state.iterators[0]).__name__}. Double momentum runs"
                        " `training_step` twice a batch, and an iterator does not return the same item twice. Use it"
                        " in `on_train_batch_start`."
                    )
                output = training_step(*args, **kwargs)
                gradients = gradients_of(module, output, self.window.batches_of_a_worker, self.loss_scale())
            total = self._sums[self.window.worker]
            for name, gradient in gradients.items():
                total[name] = total[name] + gradient if name in total else gradient

    def _clipped(self, gradients: dict[str, Tensor]) -> dict[str, Tensor]:
        return gradients if self.max_norm is None else clipped(gradients, self.max_norm)
