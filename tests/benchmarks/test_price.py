"""The benchmark of the price, on few steps: what is true of rules whose price is known."""

import math

import pytest
import torch
from harness import be_quiet
from price import (
    CAUGHT,
    RULES,
    SKIPPED,
    STOCK,
    Run,
    Training,
    ideal,
    network,
    prices,
    record,
    steps_to_loss,
    training_images,
)
from rank_pool import RankPool
from torch import Tensor
from torch.nn.functional import cross_entropy

from lightning_byzantine import ByzantineDDPStrategy

M, F = 5, 2


def recorded(num_steps: int = SKIPPED + 5) -> Tensor:
    return record(training_images(None), num_steps, M, batch_size=4)


def rows(*rules: str) -> dict[str, list[float]]:
    be_quiet()
    gradients = recorded()
    return {rule: prices(Run(M, F, rule), gradients) for rule in rules} | {"ideal": [ideal(M, F, gradients)]}


def test_what_is_known_is_measured(one_rank: RankPool) -> None:
    measured = one_rank.run(rows, "Mean", "CTMA(NNM(GeometricMedian))")[0]
    assert measured["Mean"][:3] == pytest.approx([1, 0, 1], abs=1e-5)
    assert min(measured["Mean"][3:]) > 10  # which does not see the attacks
    ctma, (best,) = measured["CTMA(NNM(GeometricMedian))"], measured["ideal"]
    assert ctma[3:] == pytest.approx([best] * len(CAUGHT), rel=1e-4)
    assert 1 < best < ctma[2] < ctma[0]  # it loses f rows, and undoing the momentum makes it worse


def test_gradients_are_those_of_the_batches() -> None:
    images = training_images(None)
    generator = torch.Generator().manual_seed(0)
    batch = torch.randint(len(images), (4,), generator=generator)  # type: ignore[arg-type]
    net, (pixels, labels) = network(), images[:]
    expected = torch.autograd.grad(cross_entropy(net(pixels[batch]), labels[batch]), list(net.parameters()))
    torch.testing.assert_close(recorded(1)[0, 0], torch.cat([part.flatten() for part in expected]))


def steps(rule: str, loss: float) -> float:
    be_quiet()
    return steps_to_loss(Training(rule, 0.01, 1, 3, 4, loss, most_steps=20), training_images(None))


def test_the_mean_takes_as_many_steps_as_stock_ddp(one_rank: RankPool) -> None:
    needed = [one_rank.run(steps, rule, 2.1)[0] for rule in (STOCK, "Mean")]
    assert needed[0] == needed[1]
    assert 10 <= needed[0] <= 20
    assert one_rank.run(steps, "Mean", 0.0) == [math.inf]


def test_rules_that_do_not_support_a_number_are_known() -> None:
    assert Run(64, 31, "MultiKrum").is_supported
    assert not Run(4, 2, "Mean").is_supported


def test_the_default_rule_is_among_them() -> None:
    assert repr(RULES["PersistentFilter"]) == repr(ByzantineDDPStrategy().aggregator)
