import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from lightning_byzantine.estimators import WorkerMomentum


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


@pytest.mark.parametrize("beta", [-0.1, 1.0, float("nan")])
def test_beta_is_bounded(beta: float) -> None:
    with pytest.raises(ValueError, match=f"beta must satisfy 0 <= beta < 1, got {beta}"):
        WorkerMomentum(beta)


def test_beta_is_a_number() -> None:
    with pytest.raises(TypeError, match="beta must be a number, got 'high'"):
        WorkerMomentum("high")
