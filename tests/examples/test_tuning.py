"""The tuning claim: its methods against recursions written by hand, its plateaus, its table and its picture."""

from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import cache
from itertools import count, islice
from pathlib import Path
from typing import Any

import pytest
import torch
import tuning
from matplotlib.figure import Figure
from rank_pool import RankPool
from reproduction.command import grid_parser
from reproduction.grid import Cell, byzantine_workers, cells, make_run
from reproduction.networks import LogisticRegression
from reproduction.training import make_model, make_trainer
from torch import Tensor
from torch.utils.data import DataLoader, DistributedSampler
from training import ParametersOfEveryStep

from lightning_byzantine import ByzantineDDPStrategy

CONFIGS = Path(tuning.__file__).parent / "configs" / "reproduce"
STEPS, PIXELS = 200, 6

Gradient = Callable[[Tensor, int], Tensor]
Projection = Callable[[Tensor], Tensor]


def sgd(gradient: Gradient, x: Tensor, lr: float, project: Projection) -> Iterator[Tensor]:
    for t in count(1):
        x = project(x - lr * gradient(x, t))
        yield x


def sgd_with_momentum(gradient: Gradient, x: Tensor, lr: float, project: Projection) -> Iterator[Tensor]:
    v = gradient(x, 1)
    for t in count(1):
        x = project(x - lr * v)
        yield x
        v = 0.9 * v + 0.1 * gradient(x, t + 1)


def storm(gradient: Gradient, x: Tensor, lr: float, project: Projection) -> Iterator[Tensor]:
    d = gradient(x, 1)
    for t in count(2):
        previous, x = x, project(x - lr * d)
        yield x
        d = gradient(x, t) + (1 - 1 / t) * (d - gradient(previous, t))


def anytime_sgd(gradient: Gradient, x: Tensor, lr: float, project: Projection) -> Iterator[Tensor]:
    w = x
    for t in count(1):
        w = project(w - lr * t * gradient(x, t))
        x = x + 2 / (t + 2) * (w - x)
        yield x


def double_momentum(
    gradient: Gradient, x: Tensor, lr: float, project: Projection, weighted: bool = True
) -> Iterator[Tensor]:
    w, d = x, gradient(x, 1)
    for t in count(1):
        w = project(w - lr * (t if weighted else 1) * d)
        previous, x = x, x + 2 / (t + 2) * (w - x)
        yield x
        d = gradient(x, t + 1) + (1 - 1 / (t + 1)) * (d - gradient(previous, t + 1))


def unweighted(gradient: Gradient, x: Tensor, lr: float, project: Projection) -> Iterator[Tensor]:
    return double_momentum(gradient, x, lr, project, weighted=False)


RECURSIONS = {
    "SGD": sgd,
    "SGD with momentum": sgd_with_momentum,
    "STORM": storm,
    "AnyTime-SGD": anytime_sgd,
    "double momentum": double_momentum,
    "double momentum, without weights": unweighted,
}


@cache
def batches() -> list[list[Tensor]]:
    generator = torch.Generator().manual_seed(1)
    images = torch.randn(STEPS + 1, 8, PIXELS, generator=generator, dtype=torch.float64)
    labels = torch.randint(10, (STEPS + 1, 8), generator=generator)
    return [list(batch) for batch in zip(images, labels, strict=True)]


def gradient_by_hand(point: Tensor, t: int) -> Tensor:
    images, labels = batches()[t - 1]
    weight, bias = point[:-10].view(10, PIXELS), point[-10:]
    errors = torch.softmax(images @ weight.T + bias, dim=1) - torch.nn.functional.one_hot(labels, 10)
    return torch.cat([(errors.T @ images).flatten(), errors.sum(0)]) / len(labels)


def projection(radius: float | None) -> Projection:
    def project(point: Tensor) -> Tensor:
        if radius is None:
            return point
        return torch.cat([part * min(1.0, radius / float(part.norm())) for part in (point[:-10], point[-10:])])

    return project


def of_config(name: str, *options: str) -> list[Cell]:
    return cells(grid_parser("", out="out").parse_args(["--config", str(CONFIGS / name), *options]))


def train_both_ways(cell: Cell, lr: float) -> tuple[Tensor, Tensor]:
    """Return the parameters after every step, of the cell's Trainer and of the recursion."""
    torch.manual_seed(1)
    run = replace(make_run(cell.run), network=LogisticRegression(PIXELS).double(), learning_rate=lr)
    model, steps = make_model(run), ParametersOfEveryStep()
    start = torch.nn.utils.parameters_to_vector(model.parameters()).detach()
    trainer = make_trainer(run)
    trainer.callbacks.append(steps)
    # A sampler that Lightning keeps: its own would shuffle.
    in_order = DistributedSampler(batches()[:STEPS], num_replicas=1, rank=0, shuffle=False)
    trainer.fit(
        model, DataLoader(batches(), batch_size=None, sampler=in_order), DataLoader(batches()[:1], batch_size=None)
    )
    name = cell.method.replace(", projected", "")
    project = projection(2.0 if name != cell.method else None)
    # Double momentum starts inside the ball.
    start = project(start) if cell.run["method"]["estimator"] else start
    by_hand = RECURSIONS[name](gradient_by_hand, start, lr, project)
    return torch.stack(steps.history), torch.stack(list(islice(by_hand, STEPS)))


@pytest.mark.slow
def test_all_methods_follow_their_recursions(one_rank: RankPool) -> None:
    grid = of_config("tuning.yaml", "--learning_rates=[1]", "--seeds=[1]")
    assert {cell.method.replace(", projected", "") for cell in grid} == set(RECURSIONS)
    for cell in grid:
        # Steps that the projection cuts, where there is one.
        actual, expected = one_rank.run(train_both_ways, cell, 3.0 if "projected" in cell.method else 0.03)[0]
        torch.testing.assert_close(
            actual, expected, rtol=0, atol=1e-12, msg=lambda text, of=cell.method: f"{of}: {text}"
        )


def test_the_attacked_config_is_four_attacks_over_the_papers_rule_and_the_default() -> None:
    grid = of_config("tuning_attacked.yaml")
    assert {cell.attack for cell in grid} == {"label flip", "sign flip", "ALIE", "IPM(0.5)"}
    assert {(cell.num_workers, cell.num_byzantine) for cell in grid} == {(17, 8)}
    rates = [cell.learning_rate for cell in grid]
    assert max(rates) / min(rates) >= 1e4
    runs = [make_run(cell.run) for cell in {cell.rule: cell for cell in grid}.values()]
    default = type(ByzantineDDPStrategy().aggregator)
    assert [type(run.rule) is default for run in runs] == [False, True]
    for run in runs:
        run.rule.check(17, len(byzantine_workers(run.setting)))


def results() -> list[dict[str, Any]]:
    """Two panels; accuracy grows with the learning rate for one method, and falls for the other one."""
    rates = (0.01, 0.1, 1.0)
    return [
        {
            "attack": attack,
            "rule": rule,
            "method": method,
            "learning_rate": rate,
            "accuracies": [0.1, 0.9 + sign * rate / 48 + (seed - 1.5) / 10],
        }
        for attack, rule in (("none", "Mean"), ("IPM", "CTMA"))
        for method, sign in (("up", 1), ("down", -1))
        for rate in reversed(rates)
        for seed in (1, 2)
    ]


def test_a_curve_is_the_mean_over_the_seeds_in_order_of_the_learning_rate() -> None:
    curves = tuning.accuracy_curves(results())
    assert list(curves) == [("none", "Mean"), ("IPM", "CTMA")]
    assert list(curves["none", "Mean"]["up"].items()) == [
        (rate, pytest.approx(0.9 + rate / 48)) for rate in (0.01, 0.1, 1.0)
    ]


def drawn(figure: Figure) -> list[tuple[str, list[str]]]:
    titled = [panel for panel in figure.axes if panel.get_title()]
    return [(panel.get_title(), panel.get_legend_handles_labels()[1]) for panel in titled]


def test_writes_a_table_and_a_picture_of_all_configs(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def trained(_: Any, options: Any) -> list[dict[str, Any]]:
        attacked = "tuning_attacked" in options.out
        assert options.seeds == [7]
        return [result for result in results() if (result["attack"] == "IPM") == attacked]

    monkeypatch.setattr(tuning, "run_grid", trained)
    configs = [str(CONFIGS / name) for name in ("tuning.yaml", "tuning_attacked.yaml")]
    tuning.main(["--configs", *configs, "--seeds=[7]", "--out", str(tmp_path)])
    said = capsys.readouterr().out
    assert "| none | `Mean` | up | 0.921 | 0.1 to 1 | 10 |" in said
    assert "| IPM | `CTMA` | down | 0.900 | 0.01 to 0.1 | 10 |" in said
    assert (tmp_path / "tuning.png").read_bytes().startswith(b"\x89PNG")
    figure = tuning.draw_tuning(tuning.accuracy_curves(results()))
    assert drawn(figure) == [(f"attack: {case}", ["up", "down"]) for case in ("none, Mean", "IPM, CTMA")]
