"""A resumed run continues exactly, from distributed checkpoints and from whole ones."""

from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from rank_pool import RankPool
from sharded_models import fit
from torch import Tensor

from lightning_byzantine import ByzantineModelParallelStrategy

SHAPE = (3, 2)


def fit_and_resume(folder: Path, resumes: bool, arguments: dict[str, Any]) -> tuple[Tensor, frozenset[int]]:
    """Train for two epochs, or for the second one only, from the checkpoint of the first."""
    checkpoints = ModelCheckpoint(folder, filename="{epoch}", every_n_epochs=1, save_top_k=-1)
    strategy = ByzantineModelParallelStrategy(*SHAPE, **arguments)
    history = fit(
        strategy,
        "FrozenOrNotAlwaysUsed",
        "Adam",
        num_steps=4,
        max_epochs=2,
        callbacks=[] if resumes else [checkpoints, Quarantines()],
        enable_checkpointing=not resumes,
        ckpt_path=str(folder / "epoch=0.ckpt") if resumes else None,
    )
    return history, strategy.quarantined


class Quarantines(pl.Callback):
    """Puts a worker into quarantine, which the checkpoint has to remember."""

    def on_train_batch_end(self, trainer: pl.Trainer, *_: Any) -> None:
        if trainer.global_step == 2:
            assert isinstance(trainer.strategy, ByzantineModelParallelStrategy)
            trainer.strategy.quarantine([1])


@pytest.mark.parametrize(
    ("distributed", "exchange"),
    [
        (True, "all_gather"),
        (False, "all_to_all"),
        pytest.param(True, "all_to_all", marks=pytest.mark.slow),
        pytest.param(False, "all_gather", marks=pytest.mark.slow),
    ],
)
def test_resumes_exactly(six_ranks: RankPool, tmp_path: Path, distributed: bool, exchange: str) -> None:
    arguments = {"save_distributed_checkpoint": distributed, "exchange": exchange}
    whole = six_ranks.run(fit_and_resume, tmp_path, False, arguments)
    resumed = six_ranks.run(fit_and_resume, tmp_path, True, arguments)
    for (history, _), (rest, quarantined) in zip(whole, resumed, strict=True):
        assert torch.equal(history[4:], rest)
        assert quarantined == {1}
