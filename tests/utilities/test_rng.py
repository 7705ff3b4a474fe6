import torch

from lightning_byzantine.utilities.rng import StepSeed


def test_every_call_and_every_seed_draws_something_else() -> None:
    draws = [tuple(torch.randperm(12, generator=source.next())) for source in map(StepSeed, range(20)) for _ in [0, 1]]
    sources = [StepSeed(seed) for seed in range(20)]
    numbers = {float(torch.rand(1, generator=source.next(), dtype=torch.float64)) for source in sources for _ in "ab"}
    assert len(numbers) == 40
    assert len(set(draws)) == len(draws)


def test_the_number_of_calls_is_saved() -> None:
    first, second = StepSeed(5), StepSeed(5)
    for _ in range(3):
        first.next()
    second.load_state_dict(first.state_dict())
    assert torch.equal(torch.rand(4, generator=first.next()), torch.rand(4, generator=second.next()))
