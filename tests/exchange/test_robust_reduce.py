"""What sync_dist makes of a rank that reports nonsense."""

from typing import Any

import pytest
import torch
from lightning.pytorch.callbacks import EarlyStopping
from rank_pool import RankPool
from torch import Tensor
from training import Regression, loader, trainer

from lightning_byzantine import ByzantineDDPStrategy


class Reporting(Regression):
    """Every rank reports its rank plus one, and some report something else."""

    def __init__(self, wrong: dict[int, float]) -> None:
        super().__init__()
        self.wrong = wrong

    def validation_step(self, batch: list[Tensor], batch_idx: int) -> None:
        value = torch.tensor(self.wrong.get(self.global_rank, self.global_rank + 1.0))
        for reduce_fx in ("mean", "sum", "max", "min"):
            self.log(reduce_fx, value, sync_dist=True, reduce_fx=reduce_fx)


def validate(wrong: dict[int, float], **arguments: Any) -> list[float]:
    runner = trainer(ByzantineDDPStrategy(**arguments))
    metrics = runner.validate(Reporting(wrong), loader(1), verbose=False)[0]
    return [metrics[name] for name in ("mean", "sum", "max", "min")]


def test_off_by_default(three_ranks: RankPool) -> None:
    assert three_ranks.run(validate, {}) == [[2, 6, 3, 1]] * 3
    assert three_ranks.run(validate, {2: -1e9})[0][0] < -1e8


@pytest.mark.parametrize(
    ("wrong", "expected"),
    [
        ({}, [2, 6, 2, 2]),
        ({0: torch.nan}, [3, 9, 3, 3]),
        ({2: -1e9}, [1, 3, 1, 1]),
        ({1: torch.inf}, [3, 9, 3, 3]),
    ],
    ids=str,
)
def test_the_median_decides(three_ranks: RankPool, wrong: dict[int, float], expected: list[float]) -> None:
    assert three_ranks.run(validate, wrong, robust_metrics=True) == [expected] * 3


def test_two_ranks_have_the_mean(two_ranks: RankPool) -> None:
    assert two_ranks.run(validate, {}, robust_metrics=True) == [[1.5, 3, 2, 1]] * 2


def reduced(values: list[float], dtype: torch.dtype, reduce_op: Any) -> list[float]:
    runner = trainer(ByzantineDDPStrategy(robust_metrics=True))
    runner.strategy.set_world_ranks()
    value = torch.tensor([values[runner.global_rank]], dtype=dtype)
    result = runner.strategy.reduce(value, reduce_op=reduce_op)
    assert result.dtype == dtype
    assert result is value  # in place, as Lightning's own
    return result.tolist()


@pytest.mark.parametrize("dtype", [torch.int64, torch.bfloat16, torch.float32])
def test_dtypes_stay(three_ranks: RankPool, dtype: torch.dtype) -> None:
    assert three_ranks.run(reduced, [3, 100, 4], dtype, "avg") == [[4]] * 3


def test_what_lightning_agrees_on_is_no_metric(three_ranks: RankPool) -> None:
    # One rank that has to stop stops all of them; a vote would leave them waiting for it.
    assert three_ranks.run(reduced, [0, 0, 1], torch.int64, torch.distributed.ReduceOp.SUM) == [[1]] * 3


def refusal() -> str:
    with pytest.raises(ValueError) as caught:
        reduced([1, 1, 1], torch.float32, "product")
    return str(caught.value)


def test_an_unknown_reduction_is_refused(three_ranks: RankPool) -> None:
    assert "reduce_op must be mean, avg, sum, max or min" in three_ranks.run(refusal)[0]


class Improving(Regression):
    """Gets better on all ranks but one, which says that nothing could be better than its first epoch."""

    def validation_step(self, batch: list[Tensor], batch_idx: int) -> None:
        wrong = self.global_rank == 1 and self.current_epoch == 0
        self.log("val_loss", torch.tensor(-1e9 if wrong else 1.0 / (1 + self.current_epoch)), sync_dist=True)


def epochs(robust_metrics: bool) -> int:
    stopping = EarlyStopping("val_loss", patience=2)
    runner = trainer(ByzantineDDPStrategy(robust_metrics=robust_metrics), callbacks=[stopping], max_epochs=6)
    runner.fit(Improving(), loader(1), loader(1))
    return runner.current_epoch


def test_early_stopping_is_not_decided_by_one_rank(three_ranks: RankPool) -> None:
    assert three_ranks.run(epochs, False) == [3, 3, 3]
    assert three_ranks.run(epochs, True) == [6, 6, 6]
