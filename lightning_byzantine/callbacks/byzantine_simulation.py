"""Puts an attack into a training run."""

import warnings
from collections.abc import Sequence
from contextlib import ExitStack
from functools import cached_property
from inspect import signature
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.strategies import DDPStrategy
from lightning.pytorch.utilities import rank_zero_warn
from torch.nn.parallel import DistributedDataParallel
from typing_extensions import override

from lightning_byzantine.aggregation.aggregation import Aggregation
from lightning_byzantine.aggregation.ddp_hook import AggregationHook
from lightning_byzantine.aggregation.engine import AggregationEngine
from lightning_byzantine.aggregators import Mean
from lightning_byzantine.attacks import Attack
from lightning_byzantine.exchange import make_exchange
from lightning_byzantine.matrix import WorkerMatrix
from lightning_byzantine.strategies.byzantine_ddp import ByzantineDDPStrategy
from lightning_byzantine.strategies.robust_strategy import RobustStrategy
from lightning_byzantine.utilities.replacing import replaced

__all__ = ["ByzantineSimulation"]


class ByzantineSimulation(pl.Callback):
    """Makes some workers Byzantine during ``fit``, under ``byzantine_ddp``, ``byzantine_fsdp`` or stock ``ddp``.

    Attacks on vectors replace the Byzantine workers' vectors, on every rank; attacks on data poison their batches
    before these are moved to the device. Logs nothing.

    Args:
        attack: what the Byzantine workers do.
        workers: their indices. Rank r is worker r, or with ``workers_per_process=k`` the k workers from r k on. Under
            ``byzantine_fsdp``, each replica is one worker.

    Raises:
        TypeError: if ``attack`` is not an Attack, or the Trainer is not ``lightning.pytorch``'s.
        ValueError: in ``setup``, unless the indices are one or more different workers that leave an honest one.
        MisconfigurationException: in ``setup``, if the strategy is neither one of this package nor from the DDP family.

    Example:
        >>> from lightning_byzantine.attacks import SignFlip
        >>> simulation = ByzantineSimulation(SignFlip(), workers=[0, 3])
        >>> trainer = pl.Trainer(strategy="ddp", accelerator="cpu", devices=5, callbacks=[simulation], logger=False)

    """

    def __init__(self, attack: Attack, workers: Sequence[int]) -> None:
        if not isinstance(attack, Attack):
            raise TypeError(f"attack must be an Attack, such as SignFlip(), got {attack!r}")
        self.attack = attack
        self.workers = workers
        self._until_teardown = ExitStack()

    def __getstate__(self) -> dict[str, Any]:
        # What ends at teardown can't be copied, and is not the copy's to end.
        return vars(self) | {"_until_teardown": ExitStack()}

    @override
    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        if not isinstance(trainer, pl.Trainer):
            raise TypeError(
                "ByzantineSimulation needs a Trainer of `lightning.pytorch`, got one of"
                f" `{type(trainer).__module__.partition('.')[0]}`. Import `lightning.pytorch` everywhere."
            )
        if not isinstance(trainer.strategy, RobustStrategy | DDPStrategy):
            raise MisconfigurationException(
                "ByzantineSimulation needs strategy='byzantine_ddp', 'byzantine_fsdp' or 'ddp', got"
                f" {type(trainer.strategy).__name__}"
            )
        self._bind(trainer.strategy)
        if stage == "fit" and self.attack.on_data:
            self._poison_batches(trainer, pl_module)

    @override
    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if not self.attack.on_vectors:
            return
        strategy = trainer.strategy
        if isinstance(strategy, RobustStrategy):
            assert strategy.engine is not None  # made in setup, just before
            strategy.engine.add_attack(self._tamper)
            return
        assert isinstance(strategy, DDPStrategy)
        if strategy._ddp_comm_hook is not None:
            raise MisconfigurationException(
                "ByzantineSimulation attacks stock ddp in DDP's only communication hook, got a strategy with another"
                f" `ddp_comm_hook`: {strategy._ddp_comm_hook!r}"
            )
        assert isinstance(strategy.model, DistributedDataParallel)
        exchange = make_exchange("all_gather", strategy.world_size)
        engine = AggregationEngine(dict(pl_module.named_parameters()), Aggregation(), exchange)
        engine.add_attack(self._tamper)
        AggregationHook(engine, pl_module).register(strategy.model)

    @override
    def teardown(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        # DDP's hook goes with the model that was wrapped for this fit.
        self._until_teardown.close()

    @override
    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        # Lightning does not tear callbacks down after an exception. Labels flipped twice would be the true ones.
        self.teardown(trainer, pl_module, "fit")

    @cached_property  # Lightning asks around every hook
    @override
    def state_key(self) -> str:
        # One Trainer may run several simulations.
        return self._generate_state_key(attack=repr(self.attack), workers=self.workers)

    @override
    def state_dict(self) -> dict[str, Any]:
        return self.attack.state_dict()

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.attack.load_state_dict(state_dict)

    def _bind(self, strategy: RobustStrategy | DDPStrategy) -> None:
        """Give the rule to the attack, and check that the attack can run."""
        num_workers = strategy.world_size
        if isinstance(strategy, RobustStrategy):
            num_workers = strategy.num_workers
            self.attack.bind(strategy.aggregator, strategy.num_byzantine)
        else:
            self.attack.bind(Mean(), num_byzantine=0)
        with warnings.catch_warnings():
            if strategy.global_rank != 0:
                warnings.simplefilter("ignore")  # rank 0 warns for all
            self.attack.check(num_workers, self.workers)
        if isinstance(strategy, RobustStrategy) and len(self.workers) > strategy.num_byzantine:
            rank_zero_warn(
                f"ByzantineSimulation makes {len(self.workers)} workers Byzantine, more than the strategy's"
                f" num_byzantine={strategy.num_byzantine} allows for: no rule can be expected to survive."
            )

    def _tamper(self, matrix: WorkerMatrix) -> WorkerMatrix:
        return self.attack.tamper(matrix, self.workers)

    def _poison_batches(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if "dataloader_iter" in signature(pl_module.training_step).parameters:
            raise MisconfigurationException(
                f"{type(self.attack).__name__} poisons the batches that Lightning hands to `training_step`, got a"
                " `training_step(dataloader_iter)` that fetches its own. Take `batch` instead."
            )
        strategy, honest = trainer.strategy, trainer.strategy.batch_to_device
        assert isinstance(strategy, RobustStrategy | DDPStrategy)

        def batch_to_device(batch: Any, device: torch.device | None = None, dataloader_idx: int = 0) -> Any:
            if trainer.training:
                # On every rank, so that all of them, and the checkpoint, have the same state of the attack.
                poisoned = self.attack.poison(batch)
                batch = poisoned if _next_worker(strategy) in self.workers else batch
            return honest(batch, device, dataloader_idx)

        # The strategy's method, since hooks for batches, of the module or the data module, come after it.
        self._until_teardown.enter_context(replaced(strategy, batch_to_device=batch_to_device))


def _next_worker(strategy: RobustStrategy | DDPStrategy) -> int:
    if isinstance(strategy, ByzantineDDPStrategy) and strategy.workers == "rank":
        assert strategy.window is not None
        return strategy.global_rank * strategy.workers_per_process + strategy.window.next_worker
    if isinstance(strategy, RobustStrategy):
        return strategy.global_rank * strategy.num_workers // strategy.world_size
    return int(strategy.global_rank)
