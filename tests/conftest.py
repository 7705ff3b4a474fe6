import os
from collections.abc import Iterator
from unittest import mock

import pytest
import torch
from hypothesis import settings
from rank_pool import RankPool

settings.register_profile("default", deadline=None, max_examples=60, derandomize=True)
settings.load_profile("default")

# Tensors in tests are small: more threads cost more than they gain, all the more beside the processes of a pool.
torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def environment() -> Iterator[None]:
    """Take back what a Trainer leaves in the environment: it would make later ones believe they are its ranks."""
    with mock.patch.dict(os.environ):
        yield


@pytest.fixture(autouse=True)
def seed() -> None:
    """Make models and batches the same in every run."""
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def one_rank() -> Iterator[RankPool]:
    pool = RankPool(1)
    yield pool
    pool.close()


@pytest.fixture(scope="session")
def two_ranks() -> Iterator[RankPool]:
    pool = RankPool(2)
    yield pool
    pool.close()


@pytest.fixture(scope="session")
def three_ranks() -> Iterator[RankPool]:
    pool = RankPool(3)
    yield pool
    pool.close()


@pytest.fixture(scope="session")
def four_ranks() -> Iterator[RankPool]:
    pool = RankPool(4)
    yield pool
    pool.close()


@pytest.fixture(scope="session")
def six_ranks() -> Iterator[RankPool]:
    pool = RankPool(6)
    yield pool
    pool.close()


@pytest.fixture(scope="session")
def five_ranks() -> Iterator[RankPool]:
    pool = RankPool(5)
    yield pool
    pool.close()


@pytest.fixture(scope="session", params=[2, 3])
def ranks(request: pytest.FixtureRequest) -> RankPool:
    return request.getfixturevalue({2: "two_ranks", 3: "three_ranks"}[request.param])
