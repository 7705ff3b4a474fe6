"""Small models that FSDP2 divides, trained by Lightning in replicas, and by a plain loop with PyTorch's own HSDP."""

from functools import cache
from typing import Any

import lightning.pytorch as pl
import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor
from torch.utils.checkpoint import checkpoint
from torch.utils.data import DataLoader, DistributedSampler, TensorDataset
from training import trainer

from lightning_byzantine import ByzantineModelParallelStrategy

BATCH = 4


@cache
def mesh_of(shape: tuple[int, int], names: tuple[str, str]) -> DeviceMesh:
    """Return the same mesh each time: a process's groups have threads that go on after the test."""
    return init_device_mesh("cpu", shape, mesh_dim_names=names)


class Sharded(pl.LightningModule):
    """A small network, of which each linear layer and the whole are units; sizes are odd, and the last is 1."""

    policy = MixedPrecisionPolicy()

    def __init__(self, optimizer: str = "SGD") -> None:
        super().__init__()
        self.optimizer = optimizer
        self.network = nn.Sequential(nn.Linear(8, 17), nn.Tanh(), nn.Linear(17, 17), nn.Tanh(), nn.Linear(17, 1))

    def configure_model(self) -> None:
        if isinstance(self, FSDPModule):  # called once more, to evaluate
            return
        self.shard(self.device_mesh["data_parallel"])

    def shard(self, mesh: DeviceMesh) -> None:
        for layer in self.modules():
            if isinstance(layer, nn.Linear):
                fully_shard(layer, mesh=mesh, mp_policy=self.policy)
        fully_shard(self, mesh=mesh, mp_policy=self.policy)

    def forward(self, inputs: Tensor, batch_idx: int) -> Tensor:
        return self.network(inputs)

    def loss(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        inputs, targets = batch
        return nn.functional.mse_loss(self(inputs, batch_idx).float(), targets)

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        loss = self.loss(batch, batch_idx)
        self.log("loss", loss, sync_dist=True)
        return loss

    def validation_step(self, batch: list[Tensor], batch_idx: int) -> None:
        self.log("val_loss", self.loss(batch, batch_idx), sync_dist=True)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        if self.optimizer == "Adam":
            return torch.optim.Adam(self.parameters(), lr=1e-2)
        return torch.optim.SGD(self.parameters(), lr=0.1, momentum=0.9)


class OneUnit(Sharded):
    def shard(self, mesh: DeviceMesh) -> None:
        fully_shard(self, mesh=mesh)


class FrozenOrNotAlwaysUsed(Sharded):
    """A layer that is frozen, and one that nobody uses in odd batches."""

    def __init__(self, optimizer: str = "SGD") -> None:
        super().__init__(optimizer)
        self.frozen = nn.Linear(8, 1).requires_grad_(False)
        self.sometimes = nn.Linear(8, 1)

    def forward(self, inputs: Tensor, batch_idx: int) -> Tensor:
        outputs = self.network(inputs) + self.frozen(inputs)
        return outputs + self.sometimes(inputs) if batch_idx % 2 == 0 else outputs


class Unused(FrozenOrNotAlwaysUsed):
    """The same, and a layer that nobody uses at all."""

    def __init__(self, optimizer: str = "SGD") -> None:
        super().__init__(optimizer)
        self.unused = nn.Linear(3, 3)


class Tied(Sharded):
    """Two layers with the same weight."""

    def __init__(self, optimizer: str = "SGD") -> None:
        super().__init__(optimizer)
        self.network = nn.Sequential(nn.Linear(8, 9), nn.Tanh(), nn.Linear(9, 9), nn.Tanh(), nn.Linear(9, 9))
        self.network[4].weight = self.network[2].weight

    def shard(self, mesh: DeviceMesh) -> None:
        fully_shard(self.network[0], mesh=mesh)
        fully_shard(self, mesh=mesh)

    def forward(self, inputs: Tensor, batch_idx: int) -> Tensor:
        return self.network(inputs).mean(dim=1, keepdim=True)


class Nested(Sharded):
    """Units within units."""

    def shard(self, mesh: DeviceMesh) -> None:
        fully_shard(self.network[0], mesh=mesh)
        fully_shard(self.network, mesh=mesh)
        fully_shard(self, mesh=mesh)


class Checkpointed(Sharded):
    """Activations are computed once more in backward, in which FSDP2 gathers parameters again."""

    def forward(self, inputs: Tensor, batch_idx: int) -> Tensor:
        for layer in self.network:
            inputs = checkpoint(layer, inputs, use_reentrant=False)
        return inputs


class InBfloat16(Sharded):
    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)


MODELS = {
    model.__name__: model
    for model in (Sharded, OneUnit, FrozenOrNotAlwaysUsed, Unused, Tied, Nested, Checkpointed, InBfloat16)
}


def data(num_steps: int, num_shares: int | None = None) -> TensorDataset:
    """Return examples for all ranks, which differ, or for a number of groups of ranks."""
    num_shares = num_shares or torch.distributed.get_world_size()
    generator = torch.Generator().manual_seed(7)
    inputs = torch.randn(BATCH * num_steps * num_shares, 8, generator=generator)
    targets = torch.sin(inputs.sum(1, keepdim=True)) + 0.1 * torch.randn(len(inputs), 1, generator=generator)
    return TensorDataset(inputs, targets)


def whole(module: nn.Module) -> Tensor:
    """Return all parameters of a divided module as one float64 vector."""
    tensors = [parameter.detach() for parameter in module.parameters()]
    return torch.cat(
        [(one.full_tensor() if isinstance(one, DTensor) else one).double().flatten().cpu() for one in tensors]
    )


class WholeParameters(pl.Callback):
    """Keeps all parameters after every batch."""

    def __init__(self) -> None:
        self.history: list[Tensor] = []

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *_: Any) -> None:
        self.history.append(whole(pl_module))


def train(
    strategy: Any,
    model: pl.LightningModule,
    dataset: TensorDataset | None = None,
    num_steps: int = 10,
    batch_size: int = BATCH,
    ckpt_path: str | None = None,
    **arguments: Any,
) -> Tensor:
    """Train by Lightning; return the parameters after each batch."""
    history = WholeParameters()
    callbacks = [history, *arguments.pop("callbacks", [])]
    batches = DataLoader(data(num_steps) if dataset is None else dataset, batch_size=batch_size)
    trainer(strategy, callbacks=callbacks, **arguments).fit(model, batches, ckpt_path=ckpt_path)
    return torch.stack(history.history)


def fit(strategy: Any, name: str = "Sharded", optimizer: str = "SGD", **arguments: Any) -> Tensor:
    """Do the same with one of ``MODELS``, which starts with the same parameters every time."""
    torch.manual_seed(1)
    return train(strategy, MODELS[name](optimizer), **arguments)


def fit_replicas(shape: tuple[int, int], name: str = "Sharded", optimizer: str = "SGD", **arguments: Any) -> Tensor:
    """Train by the strategy that is tested, with the arguments of both the strategy and the Trainer."""
    of_trainer = (
        "accumulate_grad_batches",
        "gradient_clip_val",
        "callbacks",
        "default_root_dir",
        "max_epochs",
        "num_steps",
    )
    to_trainer = {key: arguments.pop(key) for key in (*of_trainer, "num_steps") if key in arguments}
    strategy = ByzantineModelParallelStrategy(*shape, **arguments)
    return fit(strategy, name, optimizer, **to_trainer)


def fit_hsdp(
    shape: tuple[int, int],
    name: str = "Sharded",
    optimizer: str = "SGD",
    num_steps: int = 10,
    accumulate_grad_batches: int = 1,
    gradient_clip_val: float | None = None,
) -> Tensor:
    """Train by PyTorch's own HSDP, in a plain loop; return the parameters after each batch."""
    torch.manual_seed(1)
    module = MODELS[name](optimizer)
    module.log = lambda *_, **__: None  # type: ignore[method-assign]
    module.shard(mesh_of(shape, ("replicate", "shard")))
    steps = module.configure_optimizers()
    # As Lightning deals the examples.
    dataset = data(num_steps)
    sampler = DistributedSampler(dataset, shuffle=True, seed=0)
    history = []
    for index, batch in enumerate(DataLoader(dataset, batch_size=BATCH, sampler=sampler)):
        (module.loss(batch, index) / accumulate_grad_batches).backward()
        if (index + 1) % accumulate_grad_batches == 0 or index + 1 == num_steps:
            if gradient_clip_val is not None:
                nn.utils.clip_grad_norm_(module.parameters(), gradient_clip_val)
            steps.step()
            steps.zero_grad()
        history.append(whole(module))
    return torch.stack(history)
