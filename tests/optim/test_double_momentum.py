"""The optimizer on its own, in plain PyTorch."""

import pickle
from collections.abc import Callable
from copy import deepcopy
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim import LBFGS, SGD, Adam, AdamW, NAdam, Optimizer, RMSprop, SparseAdam
from torch.optim.lr_scheduler import StepLR

from lightning_byzantine.estimators.schedule import Schedule
from lightning_byzantine.optim import DoubleMomentum, DoubleMomentumEstimator

BATCHES = [
    (torch.randn(8, 5, generator=g, dtype=torch.float64), torch.randn(8, 1, generator=g, dtype=torch.float64))
    for g in [torch.Generator().manual_seed(seed) for seed in range(12)]
]


def network() -> nn.Sequential:
    torch.manual_seed(2)
    return nn.Sequential(nn.Linear(5, 7), nn.Tanh(), nn.Dropout(0.4), nn.Linear(7, 1)).double()


def vector(tensors: Any) -> Tensor:
    return torch.cat([tensor.detach().flatten() for tensor in tensors])


def closure_of(model: nn.Module, optimizer: Optimizer, batch: tuple[Tensor, Tensor]) -> Callable[[], Tensor]:
    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = nn.functional.mse_loss(model(batch[0]), batch[1])
        loss.backward()
        return loss

    return closure


def train(model: nn.Module, optimizer: Optimizer, batches: list[tuple[Tensor, Tensor]] = BATCHES) -> list[Tensor]:
    torch.manual_seed(9)
    history = []
    for batch in batches:
        optimizer.step(closure_of(model, optimizer, batch))
        history.append(vector(model.parameters()))
    return history


def recursion(
    model: nn.Module,
    schedule: Schedule,
    make_base: Callable[[list[nn.Parameter]], Optimizer],
    project: Callable[[Tensor], Tensor] = lambda point: point,
    batches: list[tuple[Tensor, Tensor]] = BATCHES,
) -> list[Tensor]:
    """The formulas, with a base optimizer that steps a parameter of its own."""
    parameters = list(model.parameters())
    iterate = nn.Parameter(project(vector(parameters).clone()))
    base = make_base([iterate])

    def gradient(point: Tensor, batch: tuple[Tensor, Tensor]) -> Tensor:
        nn.utils.vector_to_parameters(point.clone(), parameters)
        return vector(torch.autograd.grad(nn.functional.mse_loss(model(batch[0]), batch[1]), parameters))

    torch.manual_seed(9)
    history, x, previous, d = [], iterate.detach().clone(), None, None
    for t, batch in enumerate(batches, 1):
        state = torch.get_rng_state()
        g = gradient(x, batch)
        if d is None:
            d = g
        else:
            torch.set_rng_state(state)
            d = g + (1 - schedule.beta_at(t)) * (d - gradient(previous, batch))
        iterate.grad = schedule.alpha_at(t) * d
        base.step()
        iterate.data = project(iterate.data)
        gamma = schedule.gamma_at(t)
        previous, x = x, (1 - gamma) * x + gamma * iterate.detach()
        history.append(x)
    return history


BASES: dict[str, Callable[[Any], Optimizer]] = {
    "SGD": lambda parameters: SGD(parameters, lr=0.05),
    "SGD with momentum": lambda parameters: SGD(parameters, lr=0.01, momentum=0.9, nesterov=True, weight_decay=0.01),
    "SGD foreach": lambda parameters: SGD(parameters, lr=0.05, foreach=True),
    "SGD fused": lambda parameters: SGD(parameters, lr=0.05, fused=True),
    "Adam": lambda parameters: Adam(parameters, lr=0.02),
    "Adam fused": lambda parameters: Adam(parameters, lr=0.02, fused=True),
    "AdamW": lambda parameters: AdamW(parameters, lr=0.02, weight_decay=0.1),
    "AdamW foreach": lambda parameters: AdamW(parameters, lr=0.02, weight_decay=0.1, foreach=True),
    "NAdam": lambda parameters: NAdam(parameters, lr=0.02),
    "RMSprop": lambda parameters: RMSprop(parameters, lr=0.01),
}
CODE = {"schedule": "code", "min_beta": 0.01, "min_gamma": 0.01, "weighted": False}


@pytest.mark.parametrize("settings", [{}, {"beta": 0.2, "gamma": 0.5}, {"weighted": False}, CODE], ids=str)
@pytest.mark.parametrize("base", BASES)
def test_follows_the_formulas(base: str, settings: dict[str, Any]) -> None:
    model = network()
    expected = recursion(deepcopy(model), Schedule(**settings), BASES[base])
    actual = train(model, DoubleMomentum(BASES[base](model.parameters()), **settings))
    for point, formula in zip(actual, expected, strict=True):
        torch.testing.assert_close(point, formula, rtol=0, atol=1e-12)


@pytest.mark.parametrize("base", ["SGD", "Adam"])
@pytest.mark.parametrize("center", ["origin", "start"])
@pytest.mark.parametrize("per_tensor", [True, False])
def test_iterates_are_projected_onto_balls(base: str, center: str, per_tensor: bool) -> None:
    model, radius = network(), 0.8
    start = vector(model.parameters()) * (center == "start")
    sizes = [parameter.numel() for parameter in model.parameters()] if per_tensor else [len(start)]
    projected = []

    def project(point: Tensor) -> Tensor:
        offsets = (point - start).split(sizes)
        factors = [min(1.0, radius / float(offset.norm())) if offset.norm() > 0 else 1.0 for offset in offsets]
        projected.append(min(factors) < 1)
        return start + torch.cat([factor * offset for factor, offset in zip(factors, offsets, strict=True)])

    many = [BATCHES[index % len(BATCHES)] for index in range(200)]
    expected = recursion(deepcopy(model), Schedule(), BASES[base], project, many)
    ball = {"radius": radius, "center": center, "per_tensor": per_tensor}
    actual = train(model, DoubleMomentum(BASES[base](model.parameters()), **ball), many)
    assert sum(projected) > 10
    for point, formula in zip(actual, expected, strict=True):
        torch.testing.assert_close(point, formula, rtol=0, atol=1e-12)
        assert all(offset.norm() <= radius + 1e-12 for offset in (point - start).split(sizes))


def test_a_radius_that_is_never_reached_changes_no_bit() -> None:
    model = network()
    other = deepcopy(model)
    free = train(model, DoubleMomentum(SGD(model.parameters(), lr=0.05)))
    assert torch.equal(train(other, DoubleMomentum(SGD(other.parameters(), lr=0.05), radius=1e3))[-1], free[-1])


def test_a_large_learning_rate_is_harmless_in_a_ball() -> None:
    model = network()
    train(model, DoubleMomentum(SGD(model.parameters(), lr=1e6), radius=1.0))
    assert all(parameter.norm() <= 1 + 1e-12 for parameter in model.parameters())


def test_projects_complex_parameters_and_new_ones() -> None:
    first, second = nn.Parameter(torch.tensor([3 + 4j])), nn.Parameter(torch.tensor([0.0, 7.0]))
    optimizer = DoubleMomentum(SGD([first], lr=1.0), radius=2.0)
    optimizer.add_param_group({"params": [second]})
    torch.testing.assert_close(first.data, torch.tensor([1.2 + 1.6j]))
    torch.testing.assert_close(second.data, torch.tensor([0.0, 2.0]))


def test_a_ball_around_the_start_needs_the_start() -> None:
    model = network()
    optimizer = DoubleMomentum(SGD(model.parameters(), lr=0.05))
    train(model, optimizer, BATCHES[:3])
    around = DoubleMomentum(SGD(model.parameters(), lr=0.05), radius=0.1, center="start")
    with pytest.warns(UserWarning, match="saved without center='start', so the ball is around the current parameters"):
        around.load_state_dict(deepcopy(optimizer.state_dict()))
    point = vector(model.parameters())
    last = train(model, around, BATCHES[3:])[-1]
    assert 0 < (last - point).abs().max() <= 0.1


def test_returns_the_loss_at_the_query_point_and_leaves_the_gradient() -> None:
    model = network().eval()
    optimizer = DoubleMomentum(SGD(model.parameters(), lr=0.1))
    for batch in BATCHES[:3]:
        expected = nn.functional.mse_loss(model(batch[0]), batch[1])
        gradient = vector(torch.autograd.grad(expected, list(model.parameters())))
        assert torch.equal(optimizer.step(closure_of(model, optimizer, batch)), expected)
        assert torch.equal(vector(parameter.grad for parameter in model.parameters()), gradient)


def test_random_numbers_go_on_as_after_one_pass() -> None:
    model, plain = network(), network()
    train(model, DoubleMomentum(SGD(model.parameters(), lr=0.1)))
    after = torch.rand(3)
    train(plain, SGD(plain.parameters(), lr=0.1))
    assert torch.equal(torch.rand(3), after)


def test_schedules_bind_to_the_wrapper_or_to_the_base() -> None:
    results = []
    for bind_to_base in (False, True):
        model = network()
        base = SGD([{"params": model[0].parameters()}, {"params": model[3].parameters(), "lr": 0.01}], lr=0.1)
        optimizer = DoubleMomentum(base)
        scheduler = StepLR(base if bind_to_base else optimizer, step_size=2, gamma=0.1)
        for batch in BATCHES[:4]:
            optimizer.step(closure_of(model, optimizer, batch))
            scheduler.step()
        assert [group["lr"] for group in optimizer.param_groups] == pytest.approx([1e-3, 1e-4])
        results.append(vector(model.parameters()))
    assert torch.equal(*results)


@pytest.mark.parametrize("base", ["SGD", "Adam fused", "AdamW"])
@pytest.mark.parametrize("copy", ["state_dict", "saved", "pickle", "deepcopy"])
def test_continues_from_a_copy(base: str, copy: str, tmp_path: Any) -> None:
    model = network().eval()
    settings: dict[str, Any] = {"min_beta": 0.1, "radius": 0.3, "center": "start"}
    optimizer = DoubleMomentum(BASES[base](model.parameters()), **settings)
    train(model, optimizer, BATCHES[:5])
    if copy in ("pickle", "deepcopy"):
        pair = (model, optimizer)
        other, resumed = pickle.loads(pickle.dumps(pair)) if copy == "pickle" else deepcopy(pair)
    else:
        other = deepcopy(model)
        resumed = DoubleMomentum(BASES[base](other.parameters()), **settings)
        scheduler = StepLR(resumed, 100)
        state = optimizer.state_dict()
        if copy == "saved":
            torch.save(state, tmp_path / "state")
            state = torch.load(tmp_path / "state", weights_only=True)
        resumed.load_state_dict(deepcopy(state))
        assert scheduler.optimizer.param_groups is resumed.base.param_groups
        BASES[base](other.parameters()).load_state_dict(deepcopy(state))  # nobody needs the wrapper to go on without
    for ours, theirs in zip(train(model, optimizer, BATCHES[5:]), train(other, resumed, BATCHES[5:]), strict=True):
        assert torch.equal(ours, theirs)


def test_continues_from_an_optimizer_that_was_not_wrapped() -> None:
    model = network()
    base = Adam(model.parameters())
    train(model, base, BATCHES[:4])
    other = deepcopy(model)
    optimizer = DoubleMomentum(Adam(other.parameters()))
    with pytest.warns(UserWarning, match="Adam that was not wrapped in DoubleMomentum, so double"):
        optimizer.load_state_dict(deepcopy(base.state_dict()))
    expected = train(model, DoubleMomentum(base), BATCHES[4:])
    assert torch.equal(train(other, optimizer, BATCHES[4:])[-1], expected[-1])


def test_under_autocast_weights_are_cast_anew_at_the_other_point() -> None:
    results = []
    for cached in (True, False):
        model = network().float().eval()
        optimizer = DoubleMomentum(SGD(model.parameters(), lr=0.1))
        batches = [(inputs.float(), targets.float()) for inputs, targets in BATCHES]
        with torch.autocast("cpu", torch.bfloat16, cache_enabled=cached):
            results.append(train(model, optimizer, batches)[-1])
    assert torch.equal(*results)


def test_forgets_the_other_gradient_with_a_step_that_was_none() -> None:
    model = network()
    optimizer = DoubleMomentum(SGD(model.parameters(), lr=0.1))
    train(model, optimizer, BATCHES[:2])
    backward = closure_of(model, optimizer, BATCHES[2])
    passes = [backward, optimizer.zero_grad]  # a gradient at the previous point only
    optimizer.step(lambda: passes.pop(0)())
    assert not passes
    closure_of(model, optimizer, BATCHES[3])()
    with pytest.raises(RuntimeError, match="needs the gradient at the previous query point"):
        optimizer.step()


def test_refuses_new_parameters_of_half_precision_and_goes_on() -> None:
    model = network()
    optimizer = DoubleMomentum(SGD(model.parameters(), lr=0.1))
    with pytest.raises(TypeError, match=r"got torch.float16"):
        optimizer.add_param_group({"params": nn.Parameter(torch.ones(1).half())})
    assert len(optimizer.param_groups) == 1


def test_takes_new_parameters_on_the_way() -> None:
    model, head = network(), nn.Linear(1, 1).double()
    optimizer = DoubleMomentum(SGD(model.parameters(), lr=0.1))
    train(model, optimizer, BATCHES[:3])
    optimizer.add_param_group({"params": head.parameters(), "lr": 0.5})
    assert optimizer.param_groups is optimizer.base.param_groups
    before = vector(head.parameters()).clone()
    train(nn.Sequential(model, head), optimizer, BATCHES[3:6])
    assert not torch.equal(vector(head.parameters()), before)


def test_a_parameter_without_gradient_is_left_alone() -> None:
    model, unused = network(), nn.Parameter(torch.ones(3))
    optimizer = DoubleMomentum(SGD([*model.parameters(), unused], lr=0.1, weight_decay=0.5))
    train(model, optimizer)
    assert torch.equal(unused, torch.ones(3))
    assert unused.grad is None


def test_hooks_of_optimizers_are_called() -> None:
    model, calls = network(), []
    optimizer = DoubleMomentum(SGD(model.parameters(), lr=0.1))
    optimizer.register_step_pre_hook(lambda *_: calls.append("before"))
    optimizer.register_step_post_hook(lambda *_: calls.append("after"))
    train(model, optimizer, BATCHES[:2])
    assert calls == ["before", "after"] * 2


def test_a_step_without_closure_needs_the_other_gradient() -> None:
    model = network()
    optimizer = DoubleMomentum(SGD(model.parameters(), lr=0.1))
    closure_of(model, optimizer, BATCHES[0])()
    optimizer.step()  # t = 1
    closure_of(model, optimizer, BATCHES[1])()
    before = vector(model.parameters()).clone()
    with pytest.raises(RuntimeError, match="needs the gradient at the previous query point from its second step on"):
        optimizer.step()
    assert torch.equal(vector(model.parameters()), before)
    optimizer.step(closure_of(model, optimizer, BATCHES[1]))
    closure_of(model, optimizer, BATCHES[2])()
    with pytest.raises(RuntimeError, match="needs the gradient at the previous query point"):
        optimizer.step()


@pytest.mark.parametrize(
    ("base", "message"),
    [
        ("SGD", "base must be a torch.optim.Optimizer, such as .* got 'SGD'"),
        (LBFGS([nn.Parameter(torch.ones(1))]), "one dense gradient a step, which LBFGS does not"),
        (SparseAdam([nn.Parameter(torch.ones(1))]), "one dense gradient a step, which SparseAdam does not"),
        (
            DoubleMomentum(SGD([nn.Parameter(torch.ones(1))])),
            "one dense gradient a step, which DoubleMomentum does not",
        ),
        (SGD([nn.Parameter(torch.ones(1).bfloat16())]), "needs parameters of float32 or float64, got torch.bfloat16"),
    ],
    ids=["not an optimizer", "LBFGS", "SparseAdam", "twice", "half precision"],
)
def test_refuses_a_base(base: Any, message: str) -> None:
    with pytest.raises(TypeError, match=message):
        DoubleMomentum(base)


@pytest.mark.parametrize(
    ("settings", "error", "message"),
    [
        ({"beta": 0}, ValueError, "beta must satisfy 0 < beta <= 1, got 0"),
        ({"gamma": 1.5}, ValueError, "gamma must satisfy 0 < gamma <= 1, got 1.5"),
        ({"beta": float("nan")}, ValueError, "beta must satisfy"),
        ({"min_beta": -0.1}, ValueError, "min_beta must satisfy 0 <= min_beta <= 1, got -0.1"),
        (
            {"beta": 0.5, "min_beta": 0.1},
            ValueError,
            "min_beta is the floor of the scheduled beta, so it must be 0 .* got beta=0.5",
        ),
        ({"gamma": "high"}, TypeError, "gamma must be a number, got 'high'"),
        ({"weighted": 1}, TypeError, "weighted must be a bool, got 1"),
        ({"schedule": "public"}, ValueError, "schedule must be 'paper' or 'code', got 'public'"),
        ({"radius": 0}, ValueError, "radius must be finite and above 0, got 0"),
        ({"radius": "1"}, TypeError, "radius must be a number, got '1'"),
        ({"radius": 1.0, "center": "zero"}, ValueError, "center must be 'origin' or 'start', got 'zero'"),
        ({"radius": 1.0, "per_tensor": 0}, TypeError, "per_tensor must be a bool, got 0"),
        ({"center": "start"}, ValueError, "center and per_tensor need a radius, got center='start'"),
    ],
)
def test_refuses_settings(settings: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        DoubleMomentumEstimator(**settings)
    with pytest.raises(error, match=message):
        DoubleMomentum(SGD([nn.Parameter(torch.ones(1))]), **settings)


def test_the_schedule_of_the_public_code() -> None:
    schedule = Schedule(**CODE)
    assert [schedule.beta_at(t) for t in (1, 3, 7, 1000)] == [1, 0.333, 0.143, 0.01]
    assert [schedule.gamma_at(t) for t in (1, 2, 6, 1000)] == [1, 0.667, 0.286, 0.01]


def test_shows_what_was_set() -> None:
    assert repr(DoubleMomentumEstimator()) == "DoubleMomentumEstimator()"
    shown = "DoubleMomentumEstimator(min_beta=0.01, weighted=False, schedule='code')"
    assert repr(DoubleMomentumEstimator(min_beta=0.01, weighted=False, schedule="code")) == shown
    assert repr(DoubleMomentumEstimator(radius=2.0)) == "DoubleMomentumEstimator(radius=2.0)"
