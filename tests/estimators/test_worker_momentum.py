from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from oracles import limited
from torch import Tensor

from lightning_byzantine.estimators import WorkerMomentum
from lightning_byzantine.estimators.estimator import Scale, Step


def run(estimators: list[WorkerMomentum], gradients: Tensor) -> list[Tensor]:
    """Feed [steps, workers, d] to one estimator a worker, aggregate by the mean; return the optimizer's gradients."""
    received = []
    for step in gradients:
        sent = [torch.empty_like(gradient) for gradient in step]
        for estimator, gradient, out in zip(estimators, step, sent, strict=True):
            estimator.estimate("weight", gradient, out)
            estimator.commit({"weight": out})
        aggregate = torch.stack(sent).mean(0)
        gradient = torch.empty_like(aggregate)
        for estimator in estimators:
            estimator.gradient("weight", aggregate.clone(), gradient)
        received.append(gradient)
    return received


@given(beta=st.floats(0, 0.99), seed=st.integers(0, 1000))
def test_transparent_momentum_gives_the_mean_gradient_under_the_mean(beta: float, seed: int) -> None:
    gradients = torch.randn(12, 3, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    received = run([WorkerMomentum(beta) for _ in range(3)], gradients)
    torch.testing.assert_close(torch.stack(received), gradients.mean(1), rtol=1e-9, atol=1e-9)


def test_momentum_follows_the_recursion_of_the_paper() -> None:
    gradients = torch.randn(6, 1, 4, dtype=torch.float64)
    expected = gradients[0, 0]
    received = run([WorkerMomentum(0.9, transparent=False)], gradients)
    torch.testing.assert_close(received[0], expected)
    for step in range(1, 6):
        expected = 0.9 * expected + 0.1 * gradients[step, 0]
        torch.testing.assert_close(received[step], expected)


def test_a_step_that_is_not_committed_leaves_the_state_as_it_was() -> None:
    momentum, sent = WorkerMomentum(), torch.empty(2)
    momentum.estimate("weight", torch.ones(2), sent)
    momentum.commit({"weight": sent})
    before = {name: value.clone() for name, value in momentum.worker_state().items()}
    momentum.estimate("weight", torch.full((2,), torch.nan), sent)
    assert torch.equal(momentum.worker_state()["weight"], before["weight"])


def test_continues_from_a_saved_state() -> None:
    gradients = torch.randn(6, 1, 4)
    whole = run([WorkerMomentum()], gradients)
    first, second = WorkerMomentum(), WorkerMomentum()
    run([first], gradients[:3])
    second.load_state([first.worker_state()], first.shared_state())
    for resumed, expected in zip(run([second], gradients[3:]), whole[3:], strict=True):
        assert torch.equal(resumed, expected)
    second.reset()
    assert second.worker_state() == second.shared_state() == {}


# How far one step may go.

SIZES = {"weight": 5, "bias": 2}


def received_from(
    estimator: WorkerMomentum,
    aggregates: list[np.ndarray],
    scales: list[Scale | None],
    dtype: torch.dtype = torch.float64,
    sizes: dict[str, int] = SIZES,
    sent: list[np.ndarray] | None = None,
) -> list[Tensor]:
    received = []
    for step, (aggregate, scale) in enumerate(zip(aggregates, scales, strict=True)):
        split = torch.from_numpy(aggregate).to(dtype).split(list(sizes.values()))
        parts = dict(zip(sizes, split, strict=True))
        limit(estimator, parts, scale, None if sent is None else torch.from_numpy(sent[step]))
        received.append(torch.cat([gradient_of(estimator, name, parts[name]) for name in reversed(sizes)][::-1]))
    return received


def limit(
    estimator: WorkerMomentum, aggregates: dict[str, Tensor], scale: Scale | None, sent: Tensor | None = None
) -> None:
    """Limit a step, with what was sent as its own sketch, or without."""
    starts = {} if estimator.starts is None else estimator.starts.parts
    start = torch.cat([torch.zeros(part.shape) + starts.get(name, 0.0) for name, part in aggregates.items()]).double()
    way = torch.cat([aggregate.double() for aggregate in aggregates.values()]) - start
    if sent is None:
        sent = torch.full((3, len(way)), torch.nan, dtype=torch.float64)
    step = Step(torch.stack([start.norm(), way.norm()]), torch.cat([sent, start[None], way[None]]))
    estimator.limit(list(aggregates), scale and replace(scale, step=step))


def gradient_of(estimator: WorkerMomentum, name: str, aggregate: Tensor) -> Tensor:
    out = torch.empty_like(aggregate)
    estimator.gradient(name, aggregate, out)
    return out


def steps(seed: int, count: int = 12) -> tuple[list[np.ndarray], list[Scale | None]]:
    """Return aggregates, of which some change too much, and what is known of the workers; in one step nothing is."""
    random = np.random.default_rng(seed)
    aggregates = [random.normal(size=7) * random.choice([0.2, 1, 3]) for _ in range(count)]
    lengths, noise = random.uniform(0.5, 2, count) * random.choice([1, 40], count), random.uniform(0, 0.5, count)
    scales: list[Scale | None] = [Scale(*pair) for pair in zip(lengths, noise, strict=True)]
    scales[int(random.integers(count))] = None
    return aggregates, scales


@given(beta=st.sampled_from([0.1, 0.5, 0.9, 0.99]), seed=st.integers(0, 1000))
def test_a_step_is_no_longer_than_honest_gradients_explain(beta: float, seed: int) -> None:
    aggregates, scales = steps(seed)
    estimator = WorkerMomentum(beta)
    received = received_from(estimator, aggregates, scales)
    expected, momenta, bounds = limited(aggregates, scales, beta)
    before = np.zeros(7)
    for gradient, formula, momentum, bound in zip(received, expected, momenta, bounds, strict=True):
        np.testing.assert_allclose(gradient.numpy(), formula, rtol=1e-9, atol=1e-9)
        assert np.linalg.norm(gradient.numpy() - before) <= bound * (1 + 1e-9)
        before = momentum
    state = estimator.shared_state()
    np.testing.assert_allclose(torch.cat([state[name] for name in SIZES]).numpy(), momenta[-1], rtol=1e-9, atol=1e-9)


@given(beta=st.sampled_from([0.1, 0.5, 0.9, 0.99]), seed=st.integers(0, 1000))
def test_a_step_is_as_long_as_the_usual_gradient_goes(beta: float, seed: int) -> None:
    aggregates, scales = steps(seed)
    random = np.random.default_rng(seed)
    sent = [aggregate + random.normal(size=(5, 7)) * random.choice([0.01, 1]) for aggregate in aggregates]
    expected, *_ = limited(aggregates, scales, beta, sent=sent)
    received = received_from(WorkerMomentum(beta), aggregates, scales, sent=sent)
    for gradient, formula in zip(received, expected, strict=True):
        # What depends on the sketches is rounded to few digits.
        np.testing.assert_allclose(gradient.numpy(), formula, rtol=1e-2, atol=1e-2 * np.abs(formula).max())


def test_workers_that_all_go_the_same_way_are_followed_at_once() -> None:
    gradients = [np.array([1.0, 4 * (-1.0) ** (step // 3)]) for step in range(30)]
    momenta = [np.zeros(2)]
    for gradient in gradients:
        momenta.append(0.9 * momenta[-1] + 0.1 * gradient)
    sent = [np.stack([momentum + noise for noise in (-0.01, 0.0, 0.01)]) for momentum in momenta[1:]]
    scales: list[Scale | None] = [Scale(0.1, 0.01)] * 30
    received = received_from(WorkerMomentum(), momenta[1:], scales, sizes={"weight": 2}, sent=sent)
    np.testing.assert_allclose(torch.stack(received).numpy(), gradients, rtol=1e-9)
    # Two liars among five who tell of still workers, or of ones that go farther, change nothing.
    for lie in ([0.0], [1e3], [np.nan], [1e3, np.nan, 2.0]):
        told = [np.concatenate([rows, np.full((2, 2), lie[step % len(lie)])]) for step, rows in enumerate(sent)]
        received = received_from(WorkerMomentum(), momenta[1:], scales, sizes={"weight": 2}, sent=told)
        np.testing.assert_allclose(torch.stack(received).numpy(), gradients, rtol=1e-9)


def test_a_step_whose_sketches_are_too_long_is_not_let_through() -> None:
    estimator, received = WorkerMomentum(), []
    for lengths, sketches in (
        ([0.0, 1.0], [[0.2, 0.0], [0.2, 0.0], [0.2, 0.0], [0.0, 0.0], [50.0, 0.0]]),
        ([0.24, 1.0], [[0.2, 0.0], [0.2, 0.0], [0.2, 0.0], [12.0, 0.0], [-50.0, 0.0]]),
    ):
        step = Step(torch.tensor(lengths).double(), torch.tensor(sketches).double())
        estimator.limit(["weight"], Scale(0.1, 0.0, step))
        aggregate = torch.tensor([0.0, (-1.0) ** len(received)]).double()
        received.append(gradient_of(estimator, "weight", aggregate).norm())
    # 1.2 times the 2 that all workers have moved at most, of the 10 that the step is long.
    assert received[0] == pytest.approx(2.4, rel=0.01)
    # The other way, they have not moved more than 0.24 from where the step starts.
    assert received[1] < 2.4


def test_parameters_that_are_trained_in_turns_have_sketches_of_their_own() -> None:
    aggregates, scales = steps(seed=5)
    sent = [aggregate + np.arange(3.0)[:, None] for aggregate in aggregates]
    alone = received_from(WorkerMomentum(), aggregates, scales, sent=sent)
    estimator = WorkerMomentum()
    for step, (aggregate, scale) in enumerate(zip(aggregates, scales, strict=True)):
        other = {"other": torch.full((7,), float(step))}
        limit(estimator, other, Scale(1.0, 0.1), torch.ones(3, 7).double())
        gradient_of(estimator, "other", other["other"])
        parts = dict(zip(SIZES, torch.from_numpy(aggregate).split(list(SIZES.values())), strict=True))
        limit(estimator, parts, scale, torch.from_numpy(sent[step]))
        received = torch.cat([gradient_of(estimator, name, part) for name, part in parts.items()])
        assert torch.equal(received, alone[step])


def turned_back(sign_of_sketches: float = 1.0, names: tuple[str, ...] = ("weight",)) -> tuple[WorkerMomentum, float]:
    """Let all workers go one way and back; return how long the second gradient is, which is 19 if it is not cut."""
    estimator, weight = WorkerMomentum(), torch.tensor([1.0, 0.0], dtype=torch.float64)
    limit(estimator, {"weight": weight}, Scale(1.0, 0.1), weight.expand(3, 2))
    gradient_of(estimator, "weight", weight)
    state = estimator.shared_state()
    estimator.load_shared_state(state | {".sketches": sign_of_sketches * state[".sketches"]})
    aggregates = dict.fromkeys(names, weight[:0]) | {"weight": -weight}
    limit(estimator, aggregates, Scale(1.0, 0.1), -weight.expand(3, 2))
    return estimator, float(gradient_of(estimator, "weight", -weight).norm())


def test_what_is_not_known_of_the_last_step_is_not_used() -> None:
    estimator, length = turned_back()
    assert length == pytest.approx(19)
    # Sketches by other signs, and those of other parameters.
    assert turned_back(sign_of_sketches=-1.0)[1] < 12
    assert turned_back(names=("weight", "late"))[1] < 12
    # Workers of whom nothing could be used.
    weight, unknown = torch.tensor([1.0, 0.0]).double(), torch.full((3, 2), torch.nan).double()
    limit(estimator, {"weight": weight}, Scale(1.0, 0.1), unknown)
    assert gradient_of(estimator, "weight", weight).norm() < 12


def test_a_step_in_which_no_parameter_takes_part() -> None:
    estimator = WorkerMomentum()
    step = Step(torch.zeros(2).double(), torch.zeros(5, 2).double())
    estimator.limit([], Scale(1.0, 0.1, step))
    assert estimator.shared_state() == {}


def test_some_of_these_steps_are_limited_and_others_are_not() -> None:
    received, momenta, bounds = limited(*steps(seed=0), 0.9)
    befores = [np.zeros(7), *momenta[:-1]]
    lengths = [np.linalg.norm(gradient - before) for gradient, before in zip(received, befores, strict=True)]
    assert 3 <= sum(length < bound * (1 - 1e-9) for length, bound in zip(lengths, bounds, strict=True)) <= 9


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
def test_a_step_that_is_short_enough_is_taken_to_the_bit(dtype: torch.dtype) -> None:
    aggregates = steps(seed=1)[0]
    free, bounded = (
        received_from(WorkerMomentum(), aggregates, [scale] * 12, dtype) for scale in (None, Scale(1e9, 1.0))
    )
    assert all(torch.equal(*pair) for pair in zip(free, bounded, strict=True))


def test_liars_who_change_sides_in_every_step_gain_little() -> None:
    aggregates = [np.array([1.0, 0.3 * (-1) ** step]) for step in range(60)]
    sizes = {"weight": 2}
    free = received_from(WorkerMomentum(), aggregates, [None] * 60, sizes=sizes)
    bounded = received_from(WorkerMomentum(), aggregates, [Scale(1.0, 0.1)] * 60, sizes=sizes)
    assert max(gradient.norm() for gradient in free[30:]) > 5.5
    assert max(gradient.norm() for gradient in bounded[30:]) < 1.8


@pytest.mark.parametrize(
    "estimator", [WorkerMomentum(0.0), WorkerMomentum(0.9, transparent=False)], ids=["no momentum", "not undone"]
)
def test_nothing_is_limited_where_nothing_is_multiplied(estimator: WorkerMomentum) -> None:
    aggregates = steps(seed=2)[0]
    received = received_from(estimator, aggregates, [Scale(1e-3, 0.0)] * 12)
    for gradient, aggregate in zip(received, aggregates, strict=True):
        np.testing.assert_array_equal(gradient.numpy(), aggregate)


def test_where_all_gradients_are_0_nothing_is_divided_by_0() -> None:
    aggregates = [np.zeros(7), np.zeros(7), np.ones(7), np.zeros(7)]
    scales = [Scale(0.0, 0.0), Scale(0.0, 0.0), Scale(3.0, 1.0), Scale(0.0, 0.0)]
    received = received_from(WorkerMomentum(), aggregates, scales)
    assert received[0].tolist() == received[1].tolist() == [0.0] * 7
    for gradient, formula in zip(received, limited(aggregates, scales, 0.9)[0], strict=True):
        np.testing.assert_allclose(gradient.numpy(), formula, atol=1e-12)


def test_parameters_that_take_no_part_in_a_step_count_for_nothing() -> None:
    estimator = WorkerMomentum()
    weight, bias = torch.ones(5), torch.ones(2)
    limit(estimator, {"weight": weight, "bias": bias}, None)
    gradient_of(estimator, "weight", weight), gradient_of(estimator, "bias", bias)
    limit(estimator, {"weight": 3 * weight}, Scale(1.0, 0.0))
    gradient = gradient_of(estimator, "weight", 3 * weight)
    torch.testing.assert_close((gradient - weight).norm(), torch.tensor(1.2 / (1 - 0.9**2)))
    assert torch.equal(estimator.shared_state()["bias"], bias)


@pytest.mark.parametrize("done", [0, 1, 5])
def test_a_limit_goes_on_from_a_saved_state(done: int) -> None:
    aggregates, scales = steps(seed=3)
    sent = [aggregate + np.arange(3.0)[:, None] for aggregate in aggregates]
    whole, first, second = WorkerMomentum(), WorkerMomentum(), WorkerMomentum(0.9)
    expected = received_from(whole, aggregates, scales, sent=sent)
    received_from(first, aggregates[:done], scales[:done], sent=sent[:done])
    second.load_state([{}], {name: value.clone() for name, value in first.shared_state().items()})
    second.to(torch.device("cpu"))
    resumed = received_from(second, aggregates[done:], scales[done:], sent=sent[done:])
    assert all(torch.equal(*pair) for pair in zip(resumed, expected[done:], strict=True))
    assert second.shared_state().keys() == {"weight", "bias", "", ".sketches", ".sketched"}
    assert second.shared_state()[""].tolist() == [12, 12]
    second.reset()
    again = received_from(second, aggregates, scales, sent=sent)
    assert all(torch.equal(*pair) for pair in zip(again, expected, strict=True))


def test_checkpoints_of_before_are_of_many_steps() -> None:
    aggregates, scales = steps(seed=4)
    estimator = WorkerMomentum()
    estimator.load_state([{}], {name: torch.zeros(size, dtype=torch.float64) for name, size in SIZES.items()})
    expected = limited(aggregates, scales, 0.9, steps_before=10**6)[0]
    for gradient, formula in zip(received_from(estimator, aggregates, scales), expected, strict=True):
        np.testing.assert_allclose(gradient.numpy(), formula, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("beta", [-0.1, 1.0, float("nan")])
def test_beta_is_bounded(beta: float) -> None:
    with pytest.raises(ValueError, match=f"beta must satisfy 0 <= beta < 1, got {beta}"):
        WorkerMomentum(beta)


def test_beta_is_a_number() -> None:
    with pytest.raises(TypeError, match="beta must be a number, got 'high'"):
        WorkerMomentum("high")
