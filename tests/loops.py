"""Training loops without a Trainer, over the batches of ``training.fit``, for the processes of a RankPool."""

from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import torch
import torch.distributed as dist
from lightning.fabric import Fabric
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, DistributedSampler
from training import Regression, loader, parameters

from lightning_byzantine.hooks import DDPHook, robust_ddp

Tamper = Callable[[Tensor], Tensor]


def batches(num_batches: int = 10) -> list[list[Tensor]]:
    """Return this rank's batches, which a Trainer shuffles in the same way."""
    data = loader(num_batches).dataset
    return list(DataLoader(data, batch_size=4, sampler=DistributedSampler(data)))


def loss_of(model: nn.Module, batch: list[Tensor]) -> Tensor:
    inputs, targets = batch
    return nn.functional.mse_loss(model(inputs), targets)


class Loop:
    """A model in DDP with its optimizer and its hook; keeps the parameters after every step.

    Args:
        model: the model; None for the one of ``training.fit``.
        ddp: arguments of DDP.
        robust: whether to register the hook, with the other arguments.
        **arguments: of ``robust_ddp``.

    """

    def __init__(
        self, model: nn.Module | None = None, ddp: dict[str, Any] | None = None, robust: bool = True, **arguments: Any
    ) -> None:
        torch.manual_seed(1)
        self.module = Regression() if model is None else model
        self.model = DistributedDataParallel(self.module, **(ddp or {}))
        self.optimizer = torch.optim.SGD(self.module.parameters(), lr=0.1, momentum=0.9)
        self.hook: DDPHook = robust_ddp(self.model, **arguments) if robust else None  # type: ignore[assignment]
        self.history: list[Tensor] = []

    def run(
        self,
        steps: list[list[Tensor]],
        *,
        accumulate: int = 1,
        clip: float | None = None,
        tamper: Tamper = lambda loss: loss,
        scaler: torch.amp.GradScaler | None = None,
    ) -> Tensor:
        """Take steps; return the parameters after every one so far, [num_steps, num_parameters]."""
        for number, batch in enumerate(steps, 1):
            is_last = number % accumulate == 0
            with nullcontext() if is_last else self.model.no_sync():
                loss = tamper(loss_of(self.model, batch) / accumulate)
                (loss if scaler is None else scaler.scale(loss)).backward()
            if not is_last:
                continue
            if clip is not None:
                nn.utils.clip_grad_norm_(self.module.parameters(), clip)
            if scaler is None:
                self.optimizer.step()
            else:
                scaler.step(self.optimizer)
                scaler.update()
            self.optimizer.zero_grad()
            self.history.append(parameters(self.module))
        return torch.stack(self.history)


def fabric_of(strategy: Any, **arguments: Any) -> Fabric:
    """Return a Fabric over all ranks of the pool."""
    fabric = Fabric(accelerator="cpu", devices=dist.get_world_size(), strategy=strategy, **arguments)
    fabric.launch()
    return fabric
