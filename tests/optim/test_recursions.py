"""The formulas of double momentum against plain loops, to the twelfth digit."""

from copy import deepcopy
from typing import Any

import lightning.pytorch as pl
import recursions
import torch
from pairs import pairwise
from rank_pool import RankPool
from recursions import STEPS, Noisy, recursion
from torch import Tensor
from training import parameters, trainer

from lightning_byzantine import ByzantineDDPStrategy
from lightning_byzantine.aggregators import CTMA, CoordinateWiseMedian, Mean
from lightning_byzantine.optim import DoubleMomentum, DoubleMomentumEstimator

RULES = {"Mean": Mean(), "CTMA": CTMA(CoordinateWiseMedian())}


class Steps(pl.Callback):
    """Keeps x, w and d after every optimizer step."""

    def __init__(self) -> None:
        self.x: list[Tensor] = []
        self.w: list[Tensor] = []
        self.d: list[Tensor] = []

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *_: Any) -> None:
        if trainer.global_step > len(self.x):
            self.x.append(parameters(pl_module))
            state = trainer.optimizers[0].state
            self.w.append(torch.cat([state[p]["iterate"].flatten() for p in pl_module.parameters()]))
            estimates = trainer.strategy.estimator.worker_state()
            self.d.append(torch.cat([estimates[name] for name, _ in pl_module.named_parameters()]))


def train_both_ways(
    rule: str,
    accumulate: int,
    by_hand: bool,
    settings: dict[str, Any],
    worker_norm: float | None = None,
    clip: float | None = None,
    step_lr: bool = False,
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Return x, w and d of the strategy, and of the plain loops."""
    torch.manual_seed(5)
    model = Noisy(step_lr).double()
    twin = deepcopy(model)
    if by_hand:
        model.wrapper = lambda base: DoubleMomentum(base, **settings)
    strategy = ByzantineDDPStrategy(
        aggregator=RULES[rule],
        estimator="auto" if by_hand else DoubleMomentumEstimator(**settings),
        max_worker_grad_norm=worker_norm,
        bucket_cap_mb=0.001,
    )
    steps = Steps()
    runner = trainer(
        strategy,
        callbacks=[steps],
        precision="64-true",
        accumulate_grad_batches=accumulate,
        gradient_clip_val=clip,
        use_distributed_sampler=False,
    )
    runner.fit(model, recursions.loader(torch.distributed.get_rank(), accumulate))
    expected = recursion(twin, rule, accumulate, worker_norm, clip, **settings)
    return {"x": torch.stack(steps.x), "w": torch.stack(steps.w), "d": torch.stack(steps.d)}, expected


OPTIONS: list[dict[str, Any]] = [
    {},
    {"worker_norm": 0.5},
    {"clip": 0.1},
    {"step_lr": True},
    {"settings": {"beta": 0.3, "gamma": 0.4, "weighted": False}},
    {"settings": {"radius": 0.9}},
    {"settings": {"radius": 0.3, "center": "start", "per_tensor": False}},
]


@pairwise(
    options=OPTIONS, accumulate=[1, 2, 3], by_hand=[False, True], rule=list(RULES), ranks=[2, 3], indirect=["ranks"]
)
def test_follows_the_formulas(
    ranks: RankPool, rule: str, accumulate: int, by_hand: bool, options: dict[str, Any]
) -> None:
    results = ranks.run(train_both_ways, rule, accumulate, by_hand, **({"settings": {}} | options))
    for actual, expected in results:
        assert len(actual["x"]) == STEPS
        for name, value in expected.items():
            torch.testing.assert_close(actual[name], value, rtol=0, atol=1e-12)
        assert torch.equal(actual["x"], results[0][0]["x"])
