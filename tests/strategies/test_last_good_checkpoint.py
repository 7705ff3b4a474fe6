"""Checkpoints of a run whose parameters have become non-finite do not replace those from before."""

import warnings
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from rank_pool import RankPool
from torch import Tensor, nn
from training import Regression, loader, trainer

from lightning_byzantine import ByzantineDDPStrategy


class Breaking(Regression):
    """Has a parameter that becomes NaN after four steps, and a mask that was infinite from the start."""

    def __init__(self, breaks_at: int = 4) -> None:
        super().__init__()
        self.breaks_at = breaks_at
        self.mask = nn.Parameter(torch.full((2,), -torch.inf), requires_grad=False)
        self.trained_mask = nn.Parameter(torch.full((2,), -torch.inf))
        self.register_buffer("other_mask", torch.full((2,), -torch.inf))

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        return super().training_step(batch, batch_idx) + 0 * self.trained_mask.exp().sum()

    def on_train_batch_end(self, *_: Any) -> None:
        if self.global_step == self.breaks_at:
            nn.init.constant_(self.network[0].weight, torch.nan)


def fit_until_broken(folder: Path, breaks_at: int = 4, **arguments: Any) -> list[str]:
    """Save every two steps; return what was said about it on this rank."""
    torch.manual_seed(1)
    callbacks: list[pl.Callback] = [ModelCheckpoint(folder, every_n_train_steps=2, **arguments)]
    runner = trainer(ByzantineDDPStrategy(on_breakdown="propagate"), callbacks=callbacks, enable_checkpointing=True)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        runner.fit(Breaking(breaks_at), loader())
        runner.save_checkpoint(folder / "by hand.ckpt")
    return [str(warning.message) for warning in caught if "checkpoints do not replace" in str(warning.message)]


def is_finite(path: Path) -> bool:
    return torch.load(path, weights_only=False)["state_dict"]["network.0.weight"].isfinite().all().item()


@pytest.mark.parametrize("ranks", ["one_rank", "two_ranks"])
def test_the_last_good_one_stays_and_it_is_said_once(
    ranks: str, request: pytest.FixtureRequest, tmp_path: Path
) -> None:
    pool: RankPool = request.getfixturevalue(ranks)
    (tmp_path / "by hand.ckpt").write_text("not known to be broken")
    said, *by_others = pool.run(fit_until_broken, tmp_path, save_last=True)
    assert len(said) == 1
    assert by_others in ([], [[]])
    assert "The parameter 'network.0.weight' is not finite" in said[0]
    assert (tmp_path / "by hand.ckpt").read_text() == "not known to be broken"
    last = torch.load(tmp_path / "last.ckpt", weights_only=False)
    assert last["global_step"] == 4
    assert is_finite(tmp_path / "last.ckpt")
    # Lightning would keep the newest only. Of those that are broken it still does.
    others = {path.name: is_finite(path) for path in tmp_path.glob("epoch*.ckpt")}
    assert others == {"epoch=0-step=4.ckpt": True, "epoch=0-step=10.ckpt": False}


def test_nothing_changes_for_a_run_that_stays_finite(one_rank: RankPool, tmp_path: Path) -> None:
    assert one_rank.run(fit_until_broken, tmp_path, breaks_at=-1, save_last=True) == [[]]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["by hand.ckpt", "epoch=0-step=10.ckpt", "last.ckpt"]
