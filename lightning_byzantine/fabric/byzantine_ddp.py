"""The strategy of Fabric: DDP with a robust rule instead of the mean."""

from collections.abc import Callable
from typing import Any, Literal

from lightning.fabric.plugins.precision import MixedPrecision
from lightning.fabric.strategies.ddp import DDPStrategy
from lightning.fabric.utilities import rank_zero_warn
from torch.nn import Module
from torch.nn.parallel import DistributedDataParallel
from torch.optim import Optimizer
from typing_extensions import override

from lightning_byzantine.aggregators import Aggregator
from lightning_byzantine.estimators import Estimator
from lightning_byzantine.hooks import DDPHook, robust_ddp
from lightning_byzantine.hooks.arguments import check_arguments

__all__ = ["ByzantineDDPStrategy"]

_CHECKPOINT_KEY = "byzantine_ddp"


class ByzantineDDPStrategy(DDPStrategy):
    """DDP for Fabric that survives Byzantine workers: gradients are aggregated by a robust rule, not averaged.

    Each rank is one worker, and each module that ``fabric.setup`` prepares has a rule and momentum of its own.
    ``fabric.save(path, state)`` adds those of all modules in ``state``, and ``fabric.load(path, state)`` restores them.

    Args:
        aggregator: as for :func:`~lightning_byzantine.hooks.robust_ddp`, like the next five.
        num_byzantine: number of the m workers that may be Byzantine, f < m / 2. None for the largest such f.
        estimator: what a worker sends.
        exchange: "all_gather" or "all_to_all".
        max_worker_grad_norm: clips each worker's raw gradient to this norm, before the estimator. None for no clipping.
        robust_buffers: replace buffers by the median over ranks where DDP would broadcast rank 0's.
        on_breakdown: "raise" or "propagate". With ``precision="16-mixed"``, the gradient scaler skips the step.
        restart_estimator: whether ``fabric.load`` ignores the state of estimators and rules. Needed when the number of
            workers has changed.
        **kwargs: arguments of Fabric's :class:`~lightning.fabric.strategies.DDPStrategy` and of
            :class:`~torch.nn.parallel.DistributedDataParallel`.

    Attributes:
        hooks: one :class:`~lightning_byzantine.hooks.DDPHook` for each module, in the order of ``fabric.setup``, for
            reports, quarantine and simulated attacks.

    Raises:
        TypeError: if the aggregator is not an Aggregator, or the estimator not an Estimator.
        ValueError: if a choice is unknown. ``fabric.setup`` raises what :func:`~lightning_byzantine.hooks.robust_ddp`
            does.

    Example:
        >>> from lightning.fabric import Fabric
        >>> from lightning_byzantine.aggregators import CTMA, GeometricMedian
        >>> strategy = ByzantineDDPStrategy(aggregator=CTMA(base=GeometricMedian()), num_byzantine=2)
        >>> fabric = Fabric(strategy=strategy, accelerator="cpu", devices=5)

    """

    def __init__(
        self,
        aggregator: Aggregator | None = None,
        num_byzantine: int | None = None,
        estimator: Estimator | Literal["auto"] | None = "auto",
        exchange: Literal["all_gather", "all_to_all"] = "all_gather",
        max_worker_grad_norm: float | None = None,
        robust_buffers: bool = True,
        on_breakdown: Literal["raise", "propagate"] = "raise",
        restart_estimator: bool = False,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        check_arguments(aggregator, estimator, exchange, max_worker_grad_norm, on_breakdown)
        self.hooks: list[DDPHook] = []
        self.restart_estimator = restart_estimator
        self._arguments: dict[str, Any] = {
            "aggregator": aggregator,
            "num_byzantine": num_byzantine,
            "estimator": estimator,
            "exchange": exchange,
            "max_worker_grad_norm": max_worker_grad_norm,
            "robust_buffers": robust_buffers,
            "on_breakdown": on_breakdown,
        }

    @override
    def setup_module(self, module: Module) -> DistributedDataParallel:
        model = super().setup_module(module)
        scaler = self.precision.scaler if isinstance(self.precision, MixedPrecision) else None
        self.hooks.append(robust_ddp(model, scaler=scaler, **self._arguments))
        return model

    @override
    def save_checkpoint(
        self,
        path: Any,
        state: dict[str, Module | Optimizer | Any],
        storage_options: Any | None = None,
        filter: dict[str, Callable[[str, Any], bool]] | None = None,
    ) -> None:
        workers = {name: hook.state_dict() for name, hook in self._hooks_in(state).items()}
        extended = state | {_CHECKPOINT_KEY: workers} if workers else state
        super().save_checkpoint(path, extended, storage_options, filter)

    @override
    def load_checkpoint(
        self,
        path: Any,
        state: Module | Optimizer | dict[str, Module | Optimizer | Any] | None = None,
        strict: bool = True,
        weights_only: bool | None = None,
    ) -> dict[str, Any]:
        remainder = super().load_checkpoint(path, state, strict, weights_only)
        hooks = self._hooks_in(state) if isinstance(state, dict) else {}
        workers = remainder.pop(_CHECKPOINT_KEY, {}) if hooks else {}
        if self.restart_estimator:
            return remainder
        for name, hook in hooks.items():
            if name in workers:
                hook.load_state_dict(workers[name])
            else:
                rank_zero_warn(
                    f"The checkpoint has no state of workers for {name!r}, because it was not written by"
                    f" {type(self).__name__}, so the estimator and the aggregator start from zero."
                )
        return remainder

    def _hooks_in(self, state: dict[str, Any]) -> dict[str, DDPHook]:
        """Return the hooks of all modules in a state, by their names there."""
        return {name: hook for name, module in state.items() for hook in self.hooks if hook.model is module}
