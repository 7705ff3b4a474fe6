"""Double momentum by hand: plain loops in float64, with a model of its own on every rank, and no Lightning."""

from typing import Any

import lightning.pytorch as pl
import torch
import torch.distributed as dist
from oracles import coordinate_wise_median, ctma
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

STEPS = 12


class Noisy(pl.LightningModule):
    """A network with dropout and batch normalisation, whose optimizer has two parameter groups."""

    def __init__(self, step_lr: bool = False, wrapper: Any = None, optimizer: str = "SGD") -> None:
        super().__init__()
        self.step_lr, self.wrapper, self.optimizer = step_lr, wrapper, optimizer
        self.network = nn.Sequential(
            nn.Linear(6, 12), nn.BatchNorm1d(12), nn.Tanh(), nn.Dropout(0.3), nn.Linear(12, 12), nn.Tanh()
        )
        self.head = nn.Linear(12, 1)

    def forward(self, inputs: Tensor) -> Tensor:
        return self.head(self.network(inputs))

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        return nn.functional.mse_loss(self(batch[0]), batch[1])

    def on_train_start(self) -> None:
        torch.manual_seed(100 + self.global_rank)

    def configure_optimizers(self) -> Any:
        groups = [{"params": self.network.parameters()}, {"params": self.head.parameters(), "lr": 0.05}]
        kind = {"SGD": torch.optim.SGD, "Adam": torch.optim.Adam, "AdamW": torch.optim.AdamW}[self.optimizer]
        optimizer = kind(groups, lr=0.02)
        if self.wrapper is not None:
            optimizer = self.wrapper(optimizer)
        if not self.step_lr:
            return optimizer
        scheduler = torch.optim.lr_scheduler.StepLR(optimizer, step_size=3, gamma=0.5)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}


def batches(rank: int, accumulate: int) -> list[list[Tensor]]:
    generator = torch.Generator().manual_seed(rank)
    inputs = torch.randn(8 * STEPS * accumulate, 6, generator=generator, dtype=torch.float64)
    targets = torch.sin(inputs.sum(1, keepdim=True)) + 0.3 * torch.randn(
        len(inputs), 1, generator=generator, dtype=torch.float64
    )
    return [list(pair) for pair in zip(inputs.split(8), targets.split(8), strict=True)]


def loader(rank: int, accumulate: int) -> DataLoader:
    return DataLoader(TensorDataset(*map(torch.cat, zip(*batches(rank, accumulate), strict=True))), batch_size=8)


def clipped(vector: Tensor, max_norm: float | None, tiny: float = 1e-6) -> Tensor:
    length = float(vector.norm()) + tiny
    return vector if max_norm is None or length == 0 else vector * min(1.0, max_norm / length)


def recursion(
    model: Noisy,
    rule: str,
    accumulate: int,
    worker_norm: float | None = None,
    clip: float | None = None,
    beta: float | None = None,
    gamma: float | None = None,
    weighted: bool = True,
    radius: float = torch.inf,
    center: str = "origin",
    per_tensor: bool = True,
) -> dict[str, Tensor]:
    """Train by the formulas with SGD; return x, w, and this rank's d of every step."""
    rank, world_size = dist.get_rank(), dist.get_world_size()
    parameters = list(model.parameters())
    in_head = {id(parameter) for parameter in model.head.parameters()}
    learning_rates = torch.cat([torch.full_like(p.flatten(), 0.05 if id(p) in in_head else 0.02) for p in parameters])
    learning_rates = learning_rates.detach()

    def gradient(point: Tensor, micro_batches: list[list[Tensor]]) -> Tensor:
        nn.utils.vector_to_parameters(point, parameters)
        losses = [model.training_step(batch, 0) / accumulate for batch in micro_batches]
        return nn.utils.parameters_to_vector(torch.autograd.grad(sum(losses), parameters)).detach()

    start = nn.utils.parameters_to_vector(parameters).detach() * (center == "start")
    sizes = [parameter.numel() for parameter in parameters] if per_tensor else [len(start)]

    def projected(point: Tensor) -> Tensor:
        return start + torch.cat([clipped(part, radius, 0.0) for part in (point - start).split(sizes)])

    def everyones(vector: Tensor) -> Tensor:
        rows = [torch.empty_like(vector) for _ in range(world_size)]
        dist.all_gather(rows, vector)
        return torch.stack(rows)

    torch.manual_seed(100 + rank)
    x = projected(nn.utils.parameters_to_vector(parameters).detach())
    w, previous, d = x.clone(), None, None
    history: dict[str, list[Tensor]] = {"x": [], "w": [], "d": []}
    data = batches(rank, accumulate)
    for t in range(1, STEPS + 1):
        window = data[(t - 1) * accumulate : t * accumulate]
        state = torch.get_rng_state()
        g = clipped(gradient(x, window), worker_norm)
        if d is None:
            d = g
        else:
            torch.set_rng_state(state)
            earlier = clipped(gradient(previous, window), worker_norm)
            d = g + (1 - (1 / t if beta is None else beta)) * (d - earlier)
        rows = everyones(d)
        if rule == "Mean":
            aggregate = rows.mean(0)
        else:
            aggregate = torch.from_numpy(ctma(coordinate_wise_median)(list(rows.numpy()), (world_size - 1) // 2))
        aggregate = clipped(aggregate, clip)
        decay = 0.5 ** ((t - 1) // 3) if model.step_lr else 1.0
        w = w - learning_rates * decay * (t if weighted else 1) * aggregate
        w = projected(w)
        weight = 2 / (t + 2) if gamma is None else gamma
        previous, x = x, (1 - weight) * x + weight * w
        history["x"].append(x)
        history["w"].append(w)
        history["d"].append(d)
    return {name: torch.stack(values) for name, values in history.items()}
