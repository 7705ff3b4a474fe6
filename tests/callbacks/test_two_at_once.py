"""Two callbacks of a kind in one Trainer, and what they leave behind."""

import copy
import pickle
from pathlib import Path

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.callbacks import TQDMProgressBar
from rank_pool import RankPool
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset
from training import Regression, loader, trainer

from lightning_byzantine import ByzantineDDPStrategy
from lightning_byzantine.attacks import LabelFlip, NonFinite, SignFlip
from lightning_byzantine.callbacks import ByzantineMonitor, ByzantineSimulation


class Suspects(pl.Callback):
    """Keeps what the progress bar shows of suspects after every batch."""

    def __init__(self) -> None:
        self.shown: list[str] = []

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *_: object) -> None:
        self.shown.append(trainer.progress_bar_callback.get_metrics(trainer, pl_module).get("suspects", ""))


class Patient(ByzantineMonitor):
    """Of a class of its own, by which Lightning finds its state in a checkpoint."""


def shown_by_two_monitors(folder: Path) -> tuple[list[str], list[list[int]], list[str]]:
    """Return what was shown with a quick and a patient monitor, whom they suspect, and what is shown without them."""
    bar, shown, afterwards = TQDMProgressBar(), Suspects(), Suspects()
    monitors = [ByzantineMonitor(threshold=4.0), Patient(threshold=1000.0)]
    runner = trainer(
        ByzantineDDPStrategy(workers_per_process=3),
        callbacks=[ByzantineSimulation(NonFinite(), [1]), *monitors, bar, shown],
        enable_progress_bar=True,
        default_root_dir=folder,
    )
    runner.fit(Regression(), loader(12))
    assert len((folder / "suspects.jsonl").read_text().splitlines()) == 1
    runner.callbacks[:] = [bar, afterwards]
    runner.fit_loop.max_epochs = 2
    runner.fit(Regression(), loader(12))
    return shown.shown, [monitor.suspects for monitor in monitors], afterwards.shown


def test_two_monitors_leave_the_progress_bar_as_it_was(one_rank: RankPool, tmp_path: Path) -> None:
    (shown, suspects, afterwards), *_ = one_rank.run(shown_by_two_monitors, tmp_path)
    assert suspects == [[1], []]
    assert shown[0] == "" and shown[-1] == "1"
    assert set(afterwards) == {""}


class Classification(pl.LightningModule):
    """Keeps the labels that it was trained on, by their index."""

    def __init__(self) -> None:
        super().__init__()
        self.network = nn.Linear(1, 10)
        self.labels: list[tuple[int, int]] = []

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        self.labels += zip(batch[0].flatten().int().tolist(), batch[1].tolist(), strict=True)
        return nn.functional.cross_entropy(self.network(batch[0]), batch[1])

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.01)


def labels_of_two_fits() -> tuple[list[tuple[int, int]], list[tuple[int, int]]]:
    """Return the true and the given labels under two attacks on data, and then under none."""
    labels = torch.arange(20) % 10
    data = DataLoader(TensorDataset(labels[:, None].float(), labels), batch_size=1)
    model = Classification()
    simulations = [ByzantineSimulation(LabelFlip(num_classes=10), [worker]) for worker in (1, 3)]
    runner = trainer(ByzantineDDPStrategy(workers_per_process=5), callbacks=simulations)
    runner.fit(model, data)
    attacked = list(model.labels)
    runner.callbacks.clear()
    runner.fit_loop.max_epochs = 2
    runner.fit(model, data)
    return attacked, model.labels[len(attacked) :]


def test_two_attacks_on_data_end_with_the_run(one_rank: RankPool) -> None:
    ((attacked, afterwards),) = one_rank.run(labels_of_two_fits)
    assert len(attacked) == len(afterwards) == 20
    for batch, (truth, label) in enumerate(attacked):
        assert label == (9 - truth if batch % 5 in (1, 3) else truth)
    assert all(label == truth for truth, label in afterwards)


@pytest.mark.parametrize("callback", [ByzantineMonitor(), ByzantineSimulation(SignFlip(), [0])], ids=type)
def test_launchers_can_copy_a_callback(callback: pl.Callback) -> None:
    for copied in (copy.deepcopy(callback), pickle.loads(pickle.dumps(callback))):
        assert type(copied) is type(callback)
