"""Seventeen workers in one process, trained by Lightning on the device in every precision."""

import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from harness import Table
from lightning.pytorch.strategies import DDPStrategy
from on_cuda import Section, synchronize
from reproduction.networks import DigitNetwork
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_byzantine import ByzantineDDPStrategy
from lightning_byzantine.aggregators import (
    CTMA,
    NNM,
    CoordinateWiseMedian,
    CoordinateWiseTrimmedMean,
    GeometricMedian,
    Mean,
)
from lightning_byzantine.attacks import ALittleIsEnough, SignFlip
from lightning_byzantine.callbacks import ByzantineMonitor, ByzantineSimulation
from lightning_byzantine.errors import ByzantineBreakdownError
from lightning_byzantine.optim import DoubleMomentumEstimator

NUM_WORKERS = 17
BATCH_SIZE = 16


class Classifier(pl.LightningModule):
    """A convolutional network with BatchNorm, which keeps its losses on the device."""

    def __init__(self) -> None:
        super().__init__()
        self.network = DigitNetwork()
        self.losses: list[Tensor] = []

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        loss = nn.functional.cross_entropy(self.network(batch[0]), batch[1])
        self.losses.append(loss.detach())
        return loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.003)


class Clock(pl.Callback):
    """Takes the time of an optimizer step, without the first ones."""

    def __init__(self, first_step: int = 1) -> None:
        self.first_step = first_step
        self.start = self.seconds = 0.0
        self.first = 0

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *_: Any) -> None:
        if trainer.global_step >= self.first_step and self.start == 0.0:
            synchronize(pl_module.device)
            self.start, self.first = time.perf_counter(), trainer.global_step

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        synchronize(pl_module.device)
        self.seconds = (time.perf_counter() - self.start) / max(1, trainer.global_step - self.first)


def run(section: Section) -> None:
    columns = {"training": "{}", "precision": "{}", "loss of first": "{:.3f}", "and last step": "{:.3f}", "good": "{}"}
    table = section.table(columns | {"ms a step": "{:.1f}", "against stock": "{}"})
    steps = 4 if section.small else 30
    stock: Tensor | None = None
    for name, precision, strategy, callbacks in configurations(section.small):
        with section.attempt(f"{name} in {precision}"):
            model, seconds = fit(section, strategy(), precision, callbacks(), steps)
            end = parameters(model)
            if stock is None:
                stock = end
            compared = f"{float((end - stock).norm() / stock.norm()):.1e}" if precision == "32-true" else ""
            if name == "Mean":
                section.expect(float(compared) < 1e-5, f"Mean differs from stock DDP by {compared}")
            add(section, table, f"{name} in {precision}", [name, precision], model, [1e3 * seconds, compared])
    with section.attempt("resuming"):
        resume(section, table, steps)
    with section.attempt("a breakdown"):
        break_down(section)


def configurations(small: bool) -> list[tuple[str, str, Callable[[], Any], Callable[[], list[pl.Callback]]]]:
    byzantine = partial(ByzantineDDPStrategy, workers_per_process=NUM_WORKERS)
    attacked = lambda: [ByzantineSimulation(SignFlip(), workers=range(6))]  # noqa: E731
    expelling = partial(ByzantineMonitor, on_suspect="quarantine", punish_without_proof=True)
    watched = lambda: [*attacked(), expelling()]  # noqa: E731
    every: list[Any] = [
        ("stock ddp", "32-true", DDPStrategy, list),
        ("Mean", "32-true", lambda: byzantine(aggregator=Mean()), list),
        ("default", "32-true", byzantine, list),
        ("default, 6 attackers", "32-true", byzantine, attacked),
        ("default, 6 attackers, monitor with quarantine", "32-true", byzantine, watched),
        ("default, A Little Is Enough", "32-true", byzantine, lambda: [ByzantineSimulation(ALittleIsEnough(), [0, 1])]),
        ("default, clipped", "32-true", lambda: byzantine(max_worker_grad_norm=1.0), list),
        ("shadow, monitor", "32-true", lambda: byzantine(shadow=True), lambda: [ByzantineMonitor()]),
        ("double momentum", "32-true", lambda: byzantine(estimator=double_momentum()), list),
        ("compiled median", "32-true", lambda: byzantine(CTMA(NNM(CoordinateWiseMedian(compile=True)))), attacked),
    ]
    if not small:
        trimmed = CoordinateWiseTrimmedMean(compile=True)
        every.append(("compiled trimmed mean", "32-true", lambda: byzantine(trimmed), attacked))
        every.append(("median", "32-true", lambda: byzantine(CTMA(NNM(CoordinateWiseMedian()))), attacked))
    # On a CPU, Lightning has no scaler, and calls bfloat16 16-mixed as well.
    for precision in ("16-mixed", "bf16-mixed"):
        every += [
            ("default, 6 attackers, monitor", precision, byzantine, lambda: [*attacked(), ByzantineMonitor()]),
            ("double momentum", precision, lambda: byzantine(estimator=double_momentum()), list),
            (
                "clipped geometric median",
                precision,
                lambda: byzantine(GeometricMedian(), max_worker_grad_norm=1.0),
                list,
            ),
        ]
    return every


def double_momentum() -> DoubleMomentumEstimator:
    return DoubleMomentumEstimator(min_beta=0.05, min_gamma=0.05, weighted=False)


def fit(
    section: Section,
    strategy: Any,
    precision: Any,
    callbacks: list[pl.Callback],
    steps: int,
    **arguments: Any,
) -> tuple[Classifier, float]:
    """Train; return the model and the seconds of an optimizer step."""
    torch.manual_seed(1)
    model, clock = arguments.get("model") or Classifier(), Clock()
    folder = tempfile.mkdtemp()
    trainer = pl.Trainer(
        accelerator=section.device.type,
        devices=1,
        strategy=strategy,
        precision=precision,
        callbacks=[*callbacks, clock],
        accumulate_grad_batches=NUM_WORKERS,
        max_steps=steps,
        max_epochs=-1,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=folder,
    )
    trainer.fit(model, loader(30), ckpt_path=arguments.get("ckpt_path"))
    if "save" in arguments:
        trainer.save_checkpoint(arguments["save"])
    return model, clock.seconds


def loader(steps: int) -> DataLoader:
    """Return noisy pictures of ten classes, the same in every run."""
    generator = torch.Generator().manual_seed(7)
    labels = torch.randint(10, (steps * NUM_WORKERS * BATCH_SIZE,), generator=generator)
    pictures = torch.randn(10, 1, 28, 28, generator=generator)[labels]
    pictures += 2 * torch.randn(pictures.shape, generator=generator)
    return DataLoader(TensorDataset(pictures, labels), batch_size=BATCH_SIZE)


def parameters(model: nn.Module) -> Tensor:
    return torch.cat([parameter.detach().double().cpu().flatten() for parameter in model.parameters()])


def add(section: Section, table: Table, what: str, first: list[str], model: Classifier, last: list[Any]) -> None:
    losses = torch.stack(model.losses).float().cpu()
    start, end = float(losses[:NUM_WORKERS].mean()), float(losses[-NUM_WORKERS:].mean())
    finite = bool(parameters(model).isfinite().all())
    good = section.expect(finite and end < start, f"{what}: loss from {start} to {end}, parameters finite: {finite}")
    table.add(*first, start, end, good, *last)


def resume(section: Section, table: Table, steps: int) -> None:
    """Save in the middle of a run, and go on from there in a new Trainer."""
    for name, estimator in (("WorkerMomentum", lambda: "auto"), ("double momentum", double_momentum)):

        def strategy(estimator: Callable[[], Any] = estimator) -> ByzantineDDPStrategy:
            return ByzantineDDPStrategy(workers_per_process=NUM_WORKERS, estimator=estimator())

        path = Path(tempfile.mkdtemp()) / "middle.ckpt"
        first, _ = fit(section, strategy(), "16-mixed", [], steps // 2, save=path)
        model, seconds = fit(section, strategy(), "16-mixed", [], steps, ckpt_path=path)
        model.losses = first.losses + model.losses
        add(section, table, f"{name}, resumed", [f"{name}, resumed", "16-mixed"], model, [1e3 * seconds, ""])


class Broken(Classifier):
    """Has no finite loss in most batches of the second step."""

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        loss = super().training_step(batch, batch_idx)
        most = self.trainer.global_step == 1 and batch_idx % NUM_WORKERS > NUM_WORKERS // 2 - 1
        return loss * torch.nan if most else loss


def break_down(section: Section) -> None:
    """See that an error in DDP's hook, which autograd calls in a thread of its own for a GPU, arrives as itself."""
    for policy, expected in (("raise", ByzantineBreakdownError), ("skip", None), ("propagate", None)):
        raised: Exception | None = None
        try:
            strategy = ByzantineDDPStrategy(workers_per_process=NUM_WORKERS, on_breakdown=policy)
            fit(section, strategy, "32-true", [], 4, model=Broken())
        except Exception as error:
            raised = error
        what = "none" if raised is None else f"{type(raised).__name__}: {raised}"
        print(f"error of a breakdown with on_breakdown={policy!r}: {what}", flush=True)
        good = raised is None if expected is None else type(raised) is expected
        section.expect(good, f"a breakdown with on_breakdown={policy!r} raised {what}")
