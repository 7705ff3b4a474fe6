"""A resumed run continues exactly, from distributed checkpoints and from whole ones."""

from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from rank_pool import RankPool
from sharded_models import Sharded, data, fit, train
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


class SameForItsReplica(Sharded):
    """All ranks of a replica have the same data, so that their number makes no difference."""

    def loss(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        replica = self.global_rank * SHAPE[0] // torch.distributed.get_world_size()
        inputs = torch.randn(4, 8, generator=torch.Generator().manual_seed(100 * batch_idx + replica))
        return super().loss([inputs, inputs.sum(1, keepdim=True)], batch_idx)


def fit_in_parts(folder: Path, num_parts: int, distributed: bool, resumes: bool) -> Tensor:
    """Train for two epochs, or for the second one only, with each replica in so many parts."""
    torch.manual_seed(1)
    return train(
        ByzantineModelParallelStrategy(SHAPE[0], num_parts, save_distributed_checkpoint=distributed),
        SameForItsReplica(),
        data(4),
        max_epochs=2,
        callbacks=[] if resumes else [ModelCheckpoint(folder, filename="{epoch}", every_n_epochs=1, save_top_k=-1)],
        enable_checkpointing=not resumes,
        ckpt_path=str(folder / "epoch=0.ckpt") if resumes else None,
    )


@pytest.mark.parametrize("distributed", [True, pytest.param(False, marks=pytest.mark.slow)])
def test_resumes_in_another_number_of_parts(
    six_ranks: RankPool, three_ranks: RankPool, tmp_path: Path, distributed: bool
) -> None:
    whole = six_ranks.run(fit_in_parts, tmp_path, 2, distributed, False)[0]
    resumed = three_ranks.run(fit_in_parts, tmp_path, 1, distributed, True)[0]
    torch.testing.assert_close(resumed, whole[4:], atol=1e-6, rtol=0)
