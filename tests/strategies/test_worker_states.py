import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.strategies import DDPStrategy
from rank_pool import RankPool
from torch import Tensor
from training import Regression, fit, loader, parameters, trainer

from lightning_byzantine import ByzantineDDPStrategy
from lightning_byzantine.aggregators import CTMA, NNM, Bucketing, CenteredClipping, CoordinateWiseMedian, Krum
from lightning_byzantine.attacks import InnerProductManipulation, Intermittent
from lightning_byzantine.callbacks import ByzantineSimulation
from lightning_byzantine.estimators import Estimator, WorkerMomentum
from lightning_byzantine.optim import DoubleMomentumEstimator

STRATEGIES: dict[str, dict[str, Any]] = {
    "default": {},
    "paper's momentum": {"estimator": WorkerMomentum(transparent=False)},
    "no estimator": {"estimator": None},
    "rule with state": {"aggregator": CTMA(Bucketing(CoordinateWiseMedian()))},
    "rule that starts from its last result": {"aggregator": CenteredClipping(tau=0.1)},
    "rule that starts from its last result, all_to_all": {
        "aggregator": NNM(CenteredClipping(tau=0.1)),
        "exchange": "all_to_all",
        "estimator": None,
    },
    "all_to_all": {"exchange": "all_to_all"},
    "many buckets": {"aggregator": Krum(), "bucket_cap_mb": 0.0005},
    "double momentum": {"estimator": DoubleMomentumEstimator(), "max_worker_grad_norm": 1.0},
    "double momentum, rule with state, all_to_all": {
        "estimator": DoubleMomentumEstimator(beta=0.2),
        "aggregator": CTMA(Bucketing(CoordinateWiseMedian())),
        "exchange": "all_to_all",
    },
    "double momentum, accumulating": {"estimator": DoubleMomentumEstimator(), "accumulate_grad_batches": 2},
}


class DataOfTheStep(Regression):
    """Makes its batches from the step and the rank: Lightning resumes in mid-epoch, but plain loaders start over."""

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        generator = torch.Generator().manual_seed(100 * batch_idx + self.global_rank)
        inputs = torch.randn(4, 8, generator=generator)
        return super().training_step([inputs, inputs.sum(1, keepdim=True)], batch_idx)


def fit_and_save(folder: Path, optimizer: str, arguments: dict[str, Any], **trainer_arguments: Any) -> Tensor:
    """Train 8 steps, saving after step 5, in the middle of the epoch."""
    accumulate = arguments.get("accumulate_grad_batches", 1)
    steps = fit(
        ByzantineDDPStrategy(**{name: value for name, value in arguments.items() if name != "accumulate_grad_batches"}),
        DataOfTheStep(optimizer),
        num_batches=8 * accumulate,
        accumulate_grad_batches=accumulate,
        callbacks=[
            ByzantineSimulation(Intermittent(InnerProductManipulation(), probability=0.5), workers=[1]),
            ModelCheckpoint(folder, filename="{step}", every_n_train_steps=5, save_top_k=-1),
        ],
        enable_checkpointing=True,
        **trainer_arguments,
    )
    return steps[accumulate - 1 :: accumulate]


class WholeRuns:
    """Runs that were never interrupted, each with its checkpoint: several tests compare with the same."""

    def __init__(self, ranks: RankPool, folder: Path) -> None:
        self._ranks, self._folder = ranks, folder
        self._histories: dict[tuple[str, str], list[Tensor]] = {}

    def __call__(self, name: str, optimizer: str) -> tuple[list[Tensor], Path]:
        folder = self._folder / name / optimizer
        if (name, optimizer) not in self._histories:
            self._histories[name, optimizer] = self._ranks.run(fit_and_save, folder, optimizer, STRATEGIES[name])
        return self._histories[name, optimizer], folder / "step=5.ckpt"


@pytest.fixture(scope="module")
def whole_runs(three_ranks: RankPool, tmp_path_factory: pytest.TempPathFactory) -> WholeRuns:
    return WholeRuns(three_ranks, tmp_path_factory.mktemp("whole"))


# Adam's state is another, but it is Lightning that saves it.
WITH_ADAM = ("default", "double momentum")


@pytest.mark.parametrize(
    ("name", "optimizer"),
    [
        pytest.param(name, optimizer, marks=() if optimizer == "SGD" or name in WITH_ADAM else pytest.mark.slow)
        for name in STRATEGIES
        for optimizer in ("SGD", "Adam")
    ],
)
def test_resume_is_bit_identical(
    three_ranks: RankPool, whole_runs: WholeRuns, tmp_path: Path, name: str, optimizer: str
) -> None:
    whole, checkpoint = whole_runs(name, optimizer)
    torch.load(checkpoint, weights_only=True)
    resumed = three_ranks.run(fit_and_save, tmp_path, optimizer, STRATEGIES[name], ckpt_path=checkpoint)
    for rank in range(3):
        assert resumed[rank].shape == (3, whole[rank].shape[1])
        if name == "all_to_all":
            # Which columns a rank has depends on DDP's buckets, which are other ones in a process's first step. So do
            # the last digits of sums over ranks, and of weights that are computed from these.
            torch.testing.assert_close(resumed[rank], whole[rank][5:], rtol=0, atol=1e-5)
            assert torch.equal(resumed[rank], resumed[0])
        else:
            assert torch.equal(resumed[rank], whole[rank][5:])


@pytest.mark.parametrize("name", sorted(STRATEGIES.keys() - {"no estimator"}))
def test_resume_without_the_state_is_another_run(
    three_ranks: RankPool, whole_runs: WholeRuns, tmp_path: Path, name: str
) -> None:
    whole, checkpoint = whole_runs(name, "SGD")
    arguments = STRATEGIES[name] | {"restart_estimator": True}
    resumed = three_ranks.run(fit_and_save, tmp_path, "SGD", arguments, ckpt_path=checkpoint)
    assert not torch.equal(resumed[0], whole[0][5:])
    assert all(torch.equal(resumed[0], other) for other in resumed)


def fit_from(checkpoint: Path, **arguments: Any) -> tuple[Tensor | None, str]:
    """Return the parameters of the steps after the checkpoint, and what an error or warnings said."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            steps = fit(ByzantineDDPStrategy(**arguments), num_batches=12, ckpt_path=checkpoint)
        except ValueError as error:
            return None, str(error)
    return steps, "\n".join(str(warning.message) for warning in caught if "start from zero" in str(warning.message))


@pytest.mark.parametrize("estimator", [WorkerMomentum(), DoubleMomentumEstimator()], ids=repr)
def test_another_number_of_workers_is_refused_and_the_way_out_works(
    two_ranks: RankPool, three_ranks: RankPool, tmp_path: Path, estimator: Estimator
) -> None:
    three_ranks.run(fit_and_save, tmp_path, "SGD", {"estimator": estimator})
    for steps, message in two_ranks.run(fit_from, tmp_path / "step=5.ckpt", estimator=estimator):
        assert steps is None
        assert "differ in the number of workers: 3 in the checkpoint, 2 now" in message
        assert f"`ByzantineDDPStrategy(..., estimator={estimator!r}, restart_estimator=True)`" in message
    first, second = two_ranks.run(fit_from, tmp_path / "step=5.ckpt", estimator=estimator, restart_estimator=True)
    assert first[0] is not None and torch.equal(first[0], second[0])


@pytest.mark.parametrize("optimizer", ["SGD", "Adam"])
def test_double_momentum_can_begin_and_end_at_a_checkpoint(two_ranks: RankPool, tmp_path: Path, optimizer: str) -> None:
    two_ranks.run(fit_and_save, tmp_path / "one", optimizer, {})
    double = {"estimator": DoubleMomentumEstimator(), "restart_estimator": True}
    steps = two_ranks.run(fit_and_save, tmp_path, optimizer, double, ckpt_path=tmp_path / "one" / "step=5.ckpt")
    assert torch.equal(*steps) and len(steps[0]) == 3
    two_ranks.run(fit_and_save, tmp_path / "two", optimizer, {"estimator": DoubleMomentumEstimator()})
    plain = {"restart_estimator": True}
    steps = two_ranks.run(fit_and_save, tmp_path, optimizer, plain, ckpt_path=tmp_path / "two" / "step=5.ckpt")
    assert torch.equal(*steps) and len(steps[0]) == 3


def fit_stock_and_save(folder: Path) -> None:
    callbacks = [ModelCheckpoint(folder, filename="stock", every_n_train_steps=5)]
    fit(DDPStrategy(), num_batches=8, callbacks=callbacks, enable_checkpointing=True)


def test_a_checkpoint_of_stock_ddp_can_be_continued(three_ranks: RankPool, tmp_path: Path) -> None:
    three_ranks.run(fit_stock_and_save, tmp_path)
    results = three_ranks.run(fit_from, tmp_path / "stock.ckpt")
    assert all(steps is not None and torch.equal(steps, results[0][0]) for steps, _ in results)
    assert "was not written by ByzantineDDPStrategy" in results[0][1]


class Failing(Regression):
    """Raises in its seventh step, on all ranks."""

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        if batch_idx == 6:
            raise OSError("disk full")
        return super().training_step(batch, batch_idx)


class SavesOnException(Callback):
    """As Lightning's OnExceptionCheckpoint, but without the barrier that follows, and on some ranks only."""

    def __init__(self, path: Path, only_rank: int | None) -> None:
        self.path = path
        self.only_rank = only_rank

    def on_exception(self, trainer: Trainer, *_: Any) -> None:
        if self.only_rank in (None, trainer.global_rank):
            trainer.strategy.save_checkpoint(trainer._checkpoint_connector.dump_checkpoint(), self.path)


def fit_until_exception(path: Path, only_rank: int | None, estimator: Estimator) -> None:
    with pytest.raises(OSError, match="disk full"):
        fit(ByzantineDDPStrategy(estimator=estimator), Failing(), callbacks=[SavesOnException(path, only_rank)])


@pytest.mark.parametrize("estimator", [WorkerMomentum(), DoubleMomentumEstimator()], ids=repr)
@pytest.mark.parametrize("only_rank", [None, 0])
def test_saving_while_being_interrupted_waits_for_nobody(
    three_ranks: RankPool, tmp_path: Path, only_rank: int | None, estimator: Estimator
) -> None:
    three_ranks.run(fit_until_exception, tmp_path / "on_exception.ckpt", only_rank, estimator)
    results = three_ranks.run(fit_from, tmp_path / "on_exception.ckpt", estimator=estimator)
    assert all(steps is not None and torch.equal(steps, results[0][0]) for steps, _ in results)
    assert "1 of 3 workers' states, so all estimators start from zero" in results[0][1]


def save_weights_only(folder: Path) -> Tensor:
    model = Regression()
    callback = ModelCheckpoint(folder, filename="weights", save_weights_only=True)
    fit(ByzantineDDPStrategy(), model, callbacks=[callback], enable_checkpointing=True)
    return parameters(model)


def test_a_checkpoint_of_weights_only_has_no_state(two_ranks: RankPool, tmp_path: Path) -> None:
    weights = two_ranks.run(save_weights_only, tmp_path)[0]
    checkpoint = torch.load(tmp_path / "weights.ckpt", weights_only=True)
    assert "byzantine_ddp" not in checkpoint
    loaded = Regression()
    loaded.load_state_dict(checkpoint["state_dict"])
    assert torch.equal(parameters(loaded), weights)


class DroppedSinceTheFirstStep(DataOfTheStep):
    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        loss = super().training_step(batch, batch_idx)
        return loss * torch.nan if self.global_rank == 2 else loss


def fit_dropped(folder: Path, **trainer_arguments: Any) -> Tensor:
    callbacks = [ModelCheckpoint(folder, filename="{step}", every_n_train_steps=5, save_top_k=-1)]
    model = DroppedSinceTheFirstStep()
    return fit(ByzantineDDPStrategy(), model, 8, callbacks=callbacks, enable_checkpointing=True, **trainer_arguments)


def test_resumes_with_a_worker_that_never_had_a_state(three_ranks: RankPool, tmp_path: Path) -> None:
    whole = three_ranks.run(fit_dropped, tmp_path)
    resumed = three_ranks.run(fit_dropped, tmp_path / "again", ckpt_path=tmp_path / "step=5.ckpt")
    assert torch.equal(resumed[0], whole[0][5:])


def fit_last(folder: Path, max_epochs: int) -> Tensor:
    torch.manual_seed(1)
    callback = ModelCheckpoint(folder, save_last=True)
    strategy = ByzantineDDPStrategy(estimator=DoubleMomentumEstimator())
    return fit(
        strategy,
        DataOfTheStep(),
        4,
        callbacks=[callback],
        enable_checkpointing=True,
        max_epochs=max_epochs,
        ckpt_path="last",
    )


def test_double_momentum_resumes_from_the_last_checkpoint(two_ranks: RankPool, tmp_path: Path) -> None:
    whole = two_ranks.run(fit_last, tmp_path / "whole", 3)[0]
    two_ranks.run(fit_last, tmp_path / "parts", 2)
    for resumed in two_ranks.run(fit_last, tmp_path / "parts", 3):
        assert torch.equal(resumed, whole[8:])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            {"estimator": None},
            "differ in the estimator: WorkerMomentum(beta=0.9, transparent=True) in the checkpoint, None",
        ),
        ({"estimator": WorkerMomentum(0.5)}, "WorkerMomentum(beta=0.5, transparent=True) now"),
        ({"estimator": DoubleMomentumEstimator(beta=0.5)}, "DoubleMomentumEstimator(beta=0.5) now"),
        (
            {"aggregator": STRATEGIES["rule with state"]["aggregator"]},
            "differ in the state of the aggregator: ['histories._extra_state'] in the",
        ),
    ],
    ids=str,
)
def test_another_estimator_or_rule_is_refused(
    three_ranks: RankPool, tmp_path: Path, arguments: dict[str, Any], message: str
) -> None:
    three_ranks.run(fit_and_save, tmp_path, "SGD", {})
    for steps, said in three_ranks.run(fit_from, tmp_path / "step=5.ckpt", **arguments):
        assert steps is None
        assert message in said


def fit_then_save(folder: Path, num_batches: int, max_epochs: int, **arguments: Any) -> Tensor:
    torch.manual_seed(1)
    model = DataOfTheStep()
    runner = trainer(ByzantineDDPStrategy(**arguments), max_epochs=max_epochs)
    checkpoint = folder / "after_fit.ckpt"
    runner.fit(model, loader(num_batches), ckpt_path=checkpoint if checkpoint.exists() else None)
    runner.save_checkpoint(checkpoint)
    return parameters(model)


def test_saving_after_fit_keeps_the_state(three_ranks: RankPool, tmp_path: Path) -> None:
    (tmp_path / "whole").mkdir()
    whole = three_ranks.run(fit_then_save, tmp_path / "whole", 5, 2)[0]
    three_ranks.run(fit_then_save, tmp_path, 5, 1)
    for resumed in three_ranks.run(fit_then_save, tmp_path, 5, 2):
        torch.testing.assert_close(resumed, whole, rtol=0, atol=0)


class PartlyFrozen(DataOfTheStep):
    """Frozen in one layer, from the start or not at all."""

    def __init__(self, frozen: bool) -> None:
        super().__init__()
        self.network[0].requires_grad_(not frozen)


def fit_partly_frozen(folder: Path, frozen: bool, **trainer_arguments: Any) -> Tensor:
    callbacks = [ModelCheckpoint(folder, filename="{step}", every_n_train_steps=5, save_top_k=-1)]
    model = PartlyFrozen(frozen)
    return fit(ByzantineDDPStrategy(), model, 8, callbacks=callbacks, enable_checkpointing=True, **trainer_arguments)


def test_a_parameter_may_be_frozen_since_the_checkpoint(two_ranks: RankPool, tmp_path: Path) -> None:
    two_ranks.run(fit_partly_frozen, tmp_path, False)
    checkpoint = torch.load(tmp_path / "step=5.ckpt", weights_only=True)
    checkpoint["optimizer_states"] = [{"state": {}, "param_groups": checkpoint["optimizer_states"][0]["param_groups"]}]
    torch.save(checkpoint, tmp_path / "step=5.ckpt")
    first, second = two_ranks.run(fit_partly_frozen, tmp_path / "again", True, ckpt_path=tmp_path / "step=5.ckpt")
    assert torch.equal(first, second)
