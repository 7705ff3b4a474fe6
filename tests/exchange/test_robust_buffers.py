"""Whose buffers everybody has: with a faulty rank 0, not its."""

from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from rank_pool import RankPool
from torch import Tensor, nn
from training import Regression, fit, loader, trainer

from lightning_byzantine import ByzantineDDPStrategy
from lightning_byzantine.optim import DoubleMomentumEstimator


class Normed(Regression):
    """Has BatchNorm, and on one rank, statistics that are overwritten after every step."""

    def __init__(self, poison: float | None = None, poisoned: int = 0) -> None:
        super().__init__()
        self.network = nn.Sequential(nn.Linear(8, 16), nn.BatchNorm1d(16), nn.Tanh(), nn.Linear(16, 1))
        self.register_buffer("coarse", torch.ones(3, dtype=torch.bfloat16))
        self.register_buffer("mask", torch.tensor([0.0, -torch.inf]))
        self.register_buffer("flags", torch.tensor([False, False]))
        self.register_buffer("phases", torch.tensor([1 + 2j]))
        self.poison, self.poisoned = poison, poisoned
        self.seen: list[dict[str, Tensor]] = []

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        self.seen.append(self.copied_buffers())
        loss = super().training_step(batch, batch_idx)
        if self.poison is not None and self.global_rank == self.poisoned:
            for buffer in self.buffers():
                measured = buffer.is_floating_point() or buffer.is_complex()
                buffer.data.fill_(self.poison if measured else 1000)  # noticed by nobody, as a fault would be
        return loss

    def copied_buffers(self) -> dict[str, Tensor]:
        return {name: buffer.clone() for name, buffer in self.named_buffers()}


def buffers_of_fit(poison: float | None = None, poisoned: int = 0, **arguments: Any) -> list[dict[str, Tensor]]:
    """Return the buffers at the start of every step and at the end."""
    torch.manual_seed(1)  # by chance, statistics of a few rows can be far from usual
    model = Normed(poison, poisoned)
    trainer_arguments = arguments.pop("trainer_arguments", {})
    fit(ByzantineDDPStrategy(**arguments), model, **trainer_arguments)
    return [*model.seen, model.copied_buffers()]


def assert_alike(results: list[list[dict[str, Tensor]]]) -> None:
    for buffers in results[1:]:
        for ours, first in zip(buffers, results[0], strict=True):
            assert all(torch.equal(ours[name].nan_to_num(7), first[name].nan_to_num(7)) for name in first)


@pytest.mark.parametrize("poison", [torch.nan, torch.inf, -1e38, 0.0])
@pytest.mark.parametrize("poisoned", [0, 2])
def test_a_rank_with_wrong_buffers_is_outvoted(three_ranks: RankPool, poison: float, poisoned: int) -> None:
    results = three_ranks.run(buffers_of_fit, poison, poisoned)
    assert_alike(results)
    for buffers in results[0][1:]:
        assert buffers["network.1.running_mean"].abs().max() < 2
        assert 0 < buffers["network.1.running_var"].min() < buffers["network.1.running_var"].max() < 2
        assert buffers["coarse"].tolist() == [1, 1, 1]
        assert buffers["mask"].tolist() == [0, -torch.inf]
        assert buffers["flags"].tolist() == [False, False]
        assert buffers["phases"].tolist() == [1 + 2j]


def test_integers_go_by_majority(three_ranks: RankPool) -> None:
    results = three_ranks.run(buffers_of_fit, 1000.0)
    assert_alike(results)
    assert [int(buffers["network.1.num_batches_tracked"]) for buffers in results[0]] == list(range(11))


def test_rank_0_decides_without_it(three_ranks: RankPool) -> None:
    results = three_ranks.run(buffers_of_fit, 1000.0, robust_buffers=False)
    assert all(int(buffers["network.1.num_batches_tracked"]) == 1000 for result in results for buffers in result[1:-1])


def test_broadcast_buffers_false_leaves_everybody_their_own(three_ranks: RankPool) -> None:
    first, second, _ = three_ranks.run(buffers_of_fit, broadcast_buffers=False)
    assert not torch.equal(first[-1]["network.1.running_mean"], second[-1]["network.1.running_mean"])


@pytest.mark.parametrize(
    "arguments",
    [
        {"trainer_arguments": {"accumulate_grad_batches": 3}},
        {"estimator": DoubleMomentumEstimator()},
        {"exchange": "all_to_all", "find_unused_parameters": True},
    ],
    ids=str,
)
def test_all_have_the_same_at_the_start_of_a_step(three_ranks: RankPool, arguments: dict[str, Any]) -> None:
    results = three_ranks.run(buffers_of_fit, 1000.0, **arguments)
    steps = range(0, 10, 3) if "trainer_arguments" in arguments else range(10)
    for step in [*steps, -1]:
        assert_alike([[buffers[step]] for buffers in results])
        assert results[0][step]["network.1.running_mean"].abs().max() < 2


def test_the_counters_of_double_momentum_count_one_pass_a_step(three_ranks: RankPool) -> None:
    results = three_ranks.run(buffers_of_fit, estimator=DoubleMomentumEstimator())
    assert [int(buffers["network.1.num_batches_tracked"]) for buffers in results[0]] == list(range(11))


def validate_and_save(folder: Path) -> tuple[dict[str, Tensor], float, float]:
    model = Normed(1000.0)
    callback = ModelCheckpoint(folder, filename="{step}", every_n_train_steps=5, save_top_k=-1)
    runner = trainer(ByzantineDDPStrategy(), callbacks=[callback], enable_checkpointing=True)
    runner.fit(model, loader(), loader(2))
    fitted = float(runner.callback_metrics["val_loss"])
    return model.copied_buffers(), fitted, runner.validate(model, loader(2), verbose=False)[0]["val_loss"]


def test_validation_and_checkpoints_are_not_poisoned(three_ranks: RankPool, tmp_path: Path) -> None:
    results = three_ranks.run(validate_and_save, tmp_path)
    assert_alike([[buffers] for buffers, *_ in results])
    for _, fitted, validated in results:
        assert fitted == pytest.approx(validated) == pytest.approx(results[0][1])
        assert fitted < 2
    saved = torch.load(tmp_path / "step=5.ckpt", weights_only=True)["state_dict"]
    assert saved["network.1.running_mean"].abs().max() < 2
    assert saved["network.1.num_batches_tracked"] == 5
