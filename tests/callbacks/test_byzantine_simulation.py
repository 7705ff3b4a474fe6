import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.strategies import DDPStrategy
from pairs import pairwise
from rank_pool import RankPool
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset
from training import Regression, fit, loader, trainer

from lightning_byzantine import ByzantineBreakdownError, ByzantineDDPStrategy
from lightning_byzantine.aggregators import CoordinateWiseMedian, Krum, Mean
from lightning_byzantine.attacks import (
    ALittleIsEnough,
    Attack,
    BitFlip,
    GaussianNoise,
    InnerProductManipulation,
    Intermittent,
    LabelFlip,
    Mimic,
    MinMax,
    NonFinite,
    OptimalALittleIsEnough,
    OptimalInnerProductManipulation,
    Scale,
    SignFlip,
    StaleGradient,
    Zero,
)
from lightning_byzantine.callbacks import ByzantineSimulation

VECTOR_ATTACKS: list[Attack] = [
    SignFlip(),
    InnerProductManipulation(),
    ALittleIsEnough(z=1.0),
    GaussianNoise(std=10.0),
    NonFinite(),
    Zero(),
    Scale(factor=5.0),
    Mimic(),
    MinMax(),
    BitFlip(probability=0.5),
    StaleGradient(delay=3),
    Intermittent(SignFlip(), probability=0.5),
    OptimalALittleIsEnough(evaluations=4),
    OptimalInnerProductManipulation(evaluations=4),
]


def fit_attacked(strategy: type[DDPStrategy], attack: Attack, workers: list[int], **arguments: Any) -> Tensor:
    torch.manual_seed(3)
    return fit(strategy(**arguments), Regression(), callbacks=[ByzantineSimulation(attack, workers)])


@pairwise(attack=VECTOR_ATTACKS, byzantine=[0, 2], strategy=[ByzantineDDPStrategy, DDPStrategy])
def test_every_attack_is_the_same_on_all_ranks(
    three_ranks: RankPool, attack: Attack, byzantine: int, strategy: type[DDPStrategy]
) -> None:
    first, *others = three_ranks.run(fit_attacked, strategy, attack, [byzantine])
    for history in others:
        torch.testing.assert_close(history, first, rtol=0, atol=0, equal_nan=True)
    if strategy is ByzantineDDPStrategy:
        assert first.isfinite().all()


def test_stock_ddp_feels_the_attack_as_its_formula_says(three_ranks: RankPool) -> None:
    honest, attacked = (
        three_ranks.run(fit_attacked, DDPStrategy, InnerProductManipulation(epsilon), [1])[0] for epsilon in (0.0, 0.5)
    )
    start = three_ranks.run(initial_parameters)[0]
    # One of three sends -epsilon * mean of the other two: the first mean is (2 - epsilon) / 3 of theirs, against 2 / 3.
    torch.testing.assert_close(attacked[0] - start, 0.75 * (honest[0] - start), rtol=0, atol=1e-7)


def initial_parameters() -> Tensor:
    torch.manual_seed(3)
    return torch.cat([parameter.detach().double().flatten() for parameter in Regression().parameters()])


def test_stock_ddp_lets_nan_through(two_ranks: RankPool) -> None:
    assert two_ranks.run(fit_attacked, DDPStrategy, NonFinite(), [1])[0].isnan().all()


def test_more_attackers_than_num_byzantine_break_down(three_ranks: RankPool) -> None:
    three_ranks.run(fit_until_breakdown)


def fit_until_breakdown() -> None:
    with pytest.raises(ByzantineBreakdownError, match="workers 0, 1"):
        fit_attacked(ByzantineDDPStrategy, NonFinite(), [0, 1])


class Classification(pl.LightningModule):
    """Keeps the true labels, which are in the first input, beside those it was given."""

    def __init__(self) -> None:
        super().__init__()
        self.network = nn.Linear(8, 10)
        self.trained_on: list[tuple[float, int]] = []
        self.validated_on: list[tuple[float, int]] = []

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        self.trained_on += zip(batch[0][:, 0].tolist(), batch[1].tolist(), strict=True)
        return nn.functional.cross_entropy(self.network(batch[0]), batch[1])

    def validation_step(self, batch: list[Tensor], batch_idx: int) -> None:
        self.validated_on += zip(batch[0][:, 0].tolist(), batch[1].tolist(), strict=True)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1)


class FetchesItsOwn(Classification):
    def training_step(self, dataloader_iter: Iterator[Any]) -> Tensor:
        return super().training_step(next(dataloader_iter)[0], 0)


def labels_of_fit(strategy: type[DDPStrategy], workers: list[int]) -> list[list[tuple[float, int]]]:
    """Train and validate under the attack, then train without it."""
    labels = torch.arange(24) % 10
    data = DataLoader(TensorDataset(labels[:, None].repeat(1, 8).float(), labels), batch_size=4)
    model = Classification()
    runner = trainer(strategy(), callbacks=[ByzantineSimulation(LabelFlip(num_classes=10), workers)])
    runner.fit(model, data, data)
    attacked, validated = list(model.trained_on), list(model.validated_on)
    runner.callbacks.clear()
    runner.fit_loop.max_epochs = 2
    runner.fit(model, data)
    return [attacked, validated, model.trained_on[len(attacked) :]]


@pytest.mark.parametrize("strategy", [ByzantineDDPStrategy, DDPStrategy])
def test_label_flip_poisons_the_training_of_its_workers_only(
    three_ranks: RankPool, strategy: type[DDPStrategy]
) -> None:
    for rank, (attacked, validated, afterwards) in enumerate(three_ranks.run(labels_of_fit, strategy, [2])):
        assert len(attacked) == len(afterwards) == 8
        assert all(label == (9 - truth if rank == 2 else truth) for truth, label in attacked)
        assert all(label == truth for truth, label in [*validated, *afterwards])


def trained_on(attack: Attack, workers: list[int]) -> list[tuple[float, int]]:
    labels = torch.arange(36) % 10
    data = DataLoader(TensorDataset(labels[:, None].repeat(1, 8).float(), labels), batch_size=1)
    model = Classification()
    callback = ByzantineSimulation(attack, workers)
    trainer(ByzantineDDPStrategy(), callbacks=[callback]).fit(model, data)
    # What a checkpoint by rank 0 would have to know, though rank 0 is honest.
    resumed = Intermittent(LabelFlip(num_classes=10), probability=0.5)
    resumed.load_state_dict(callback.state_dict())
    upcoming = [resumed.poison((0, torch.tensor([2])))[1].item() for _ in range(8)]
    return [*model.trained_on, (0.0, int("".join(map(str, upcoming))))]


def test_an_intermittent_attack_on_data_is_drawn_for_alike_on_all_ranks(three_ranks: RankPool) -> None:
    results = three_ranks.run(trained_on, Intermittent(LabelFlip(num_classes=10), probability=0.5), [1, 2])
    flipped = [[label == 9 - truth for truth, label in result[:-1]] for result in results]
    assert not any(flipped[0])
    assert flipped[1] == flipped[2]
    assert 0 < sum(flipped[1]) < len(flipped[1])
    assert len({result[-1] for result in results}) == 1


def fit_against(attack: Attack, strategy: type[DDPStrategy], **arguments: Any) -> Tensor:
    return fit_attacked(strategy, attack, [0], **arguments)


@pytest.mark.slow
def test_a_line_search_is_against_the_rule_in_use(three_ranks: RankPool) -> None:
    for arguments in ({"aggregator": CoordinateWiseMedian()}, {"aggregator": Krum(), "num_byzantine": 0}):
        rule, bound = arguments["aggregator"], arguments.get("num_byzantine", 1)
        found, told = (
            three_ranks.run(fit_against, attack, ByzantineDDPStrategy, **arguments)[0]
            for attack in (OptimalALittleIsEnough(), OptimalALittleIsEnough(rule, num_byzantine=bound))
        )
        assert torch.equal(found, told)
    found, told = (
        three_ranks.run(fit_against, attack, DDPStrategy)[0]
        for attack in (
            OptimalInnerProductManipulation(evaluations=3),
            # Against the mean, the search only ever doubles: 0, 1, 3.
            InnerProductManipulation(epsilon=3.0),
        )
    )
    assert torch.equal(found, told)


def fit_error(callback: ByzantineSimulation, strategy: Any, model: type[pl.LightningModule] = Regression) -> str:
    with pytest.raises((ValueError, MisconfigurationException)) as caught:
        trainer(strategy, callbacks=[callback]).fit(model(), loader())
    return f"{type(caught.value).__name__}: {caught.value}"


def test_misuse_is_named_before_training(two_ranks: RankPool) -> None:
    def message(*args: Any) -> str:
        return two_ranks.run(fit_error, *args)[0]

    assert (
        message(ByzantineSimulation(SignFlip(), [2]), "byzantine_ddp")
        == "ValueError: workers must be indices in [0, 2) for 2 workers, got 2"
    )
    assert "workers must leave at least one honest worker" in message(ByzantineSimulation(SignFlip(), [0, 1]), "ddp")
    assert "worker must be an honest one, got worker=0 with [0] Byzantine" in message(
        ByzantineSimulation(Mimic(worker=0), [0]), "byzantine_ddp"
    )
    assert "z must be given" in message(ByzantineSimulation(ALittleIsEnough(), [0]), "byzantine_ddp")
    assert "in DDP's only communication hook" in message(
        ByzantineSimulation(SignFlip(), [0]), DDPStrategy(ddp_comm_hook=fit_error)
    )
    assert "`training_step(dataloader_iter)` that fetches its own" in message(
        ByzantineSimulation(LabelFlip(10), [0]), "byzantine_ddp", FetchesItsOwn
    )


def test_needs_ddp() -> None:
    runner = pl.Trainer(
        accelerator="cpu",
        devices=1,
        logger=False,
        enable_checkpointing=False,
        callbacks=[ByzantineSimulation(SignFlip(), [0])],
    )
    with pytest.raises(
        MisconfigurationException, match="strategy='byzantine_ddp', 'byzantine_fsdp' or 'ddp', got SingleDeviceStrategy"
    ):
        runner.fit(Regression(), DataLoader(TensorDataset(torch.zeros(4, 8), torch.zeros(4, 1))))


def test_needs_an_attack() -> None:
    with pytest.raises(TypeError, match=r"attack must be an Attack, such as SignFlip\(\), got 'SignFlip'"):
        ByzantineSimulation("SignFlip", [0])


def fit_with_pytorch_lightning() -> str:
    import pytorch_lightning as other
    from pytorch_lightning.demos.boring_classes import BoringModel

    callbacks = [ByzantineSimulation(SignFlip(), [0])]
    runner = other.Trainer(accelerator="cpu", devices=1, logger=False, enable_checkpointing=False, callbacks=callbacks)
    with pytest.raises(TypeError) as caught:
        runner.fit(BoringModel())
    return str(caught.value)


def test_needs_a_trainer_of_lightning(one_rank: RankPool) -> None:
    assert one_rank.run(fit_with_pytorch_lightning) == [
        "ByzantineSimulation needs a Trainer of `lightning.pytorch`, got one of `pytorch_lightning`."
        " Import `lightning.pytorch` everywhere."
    ]


class FailsOnce(Classification):
    def on_train_batch_end(self, *_: Any) -> None:
        raise OSError("disk full")


def labels_after_an_exception() -> list[tuple[float, int]]:
    labels = torch.arange(24) % 10
    data = DataLoader(TensorDataset(labels[:, None].repeat(1, 8).float(), labels), batch_size=4)
    model = FailsOnce()
    runner = trainer("byzantine_ddp", callbacks=[ByzantineSimulation(LabelFlip(num_classes=10), [0])])
    for _ in range(2):
        with pytest.raises(OSError, match="disk full"):
            runner.fit(model, data)
    return model.trained_on


def test_an_exception_leaves_no_flip_behind_that_would_undo_the_next(two_ranks: RankPool) -> None:
    assert all(label == 9 - truth for truth, label in two_ranks.run(labels_after_an_exception)[0])


def fit_two_attacks() -> Tensor:
    torch.manual_seed(3)
    callbacks = [ByzantineSimulation(NonFinite(), [0]), ByzantineSimulation(SignFlip(), [1])]
    return fit(ByzantineDDPStrategy(), Regression(), callbacks=callbacks)


def test_two_attacks_in_one_run(three_ranks: RankPool) -> None:
    histories = three_ranks.run(fit_two_attacks)
    assert histories[0].isfinite().all()
    assert torch.equal(histories[0], histories[2])


def warnings_of_setup(attack: Attack, workers: list[int], words: str) -> int:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        fit_attacked(ByzantineDDPStrategy, attack, workers)
    return sum(words in str(warning.message) for warning in caught)


def test_a_harmless_attack_warns_once(three_ranks: RankPool) -> None:
    assert three_ranks.run(warnings_of_setup, ALittleIsEnough(), [0], "does no harm") == [1, 0, 0]


def test_more_attackers_than_num_byzantine_warn_once(three_ranks: RankPool) -> None:
    words = "makes 2 workers Byzantine, more than the strategy's num_byzantine=1"
    assert three_ranks.run(warnings_of_setup, SignFlip(), [0, 1], words) == [1, 0, 0]
    assert three_ranks.run(warnings_of_setup, SignFlip(), [0], "workers Byzantine, more than") == [0, 0, 0]


def test_the_attack_is_in_the_checkpoint() -> None:
    callback, other = ByzantineSimulation(GaussianNoise(), [0]), ByzantineSimulation(GaussianNoise(), [0])
    callback.attack(torch.zeros(2, 2), [0])
    other.load_state_dict(callback.state_dict())
    assert torch.equal(other.attack(torch.zeros(2, 2), [0]), callback.attack(torch.zeros(2, 2), [0]))


def fit_stale(folder: Path, exchange: str, **arguments: Any) -> Tensor:
    callbacks = [
        ByzantineSimulation(StaleGradient(delay=2), [1]),
        ModelCheckpoint(folder, filename="{step}", every_n_train_steps=4, save_top_k=-1),
    ]
    strategy = ByzantineDDPStrategy(exchange=exchange)
    return fit(strategy, Regression(), callbacks=callbacks, num_batches=8, enable_checkpointing=True, **arguments)


@pytest.mark.parametrize("exchange", ["all_gather", "all_to_all"])
def test_a_resumed_run_has_no_old_gradients(three_ranks: RankPool, tmp_path: Path, exchange: str) -> None:
    three_ranks.run(fit_stale, tmp_path, exchange)
    kept = torch.load(tmp_path / "step=4.ckpt", weights_only=True)["callbacks"]
    assert not any("StaleGradient" in key for key in kept)
    histories = three_ranks.run(fit_stale, tmp_path, exchange, ckpt_path=tmp_path / "step=4.ckpt")
    assert len(histories[0]) == 4 and histories[0].isfinite().all()
    assert all(torch.equal(history, histories[0]) for history in histories)


def test_mean_is_moved_and_the_default_is_not(three_ranks: RankPool) -> None:
    clean = three_ranks.run(fit_attacked, ByzantineDDPStrategy, GaussianNoise(std=0.0), [1], aggregator=Mean())[0]
    moved = three_ranks.run(fit_attacked, ByzantineDDPStrategy, GaussianNoise(std=10.0), [1], aggregator=Mean())[0]
    robust = three_ranks.run(fit_attacked, ByzantineDDPStrategy, GaussianNoise(std=10.0), [1])[0]
    assert (robust - clean).norm() < 0.05 * (moved - clean).norm()
