"""What a failed collective is put down to. With real signals: test_process_faults.py."""

import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta

import pytest
from torch.distributed import HashStore

from lightning_byzantine.errors import ByzantineBreakdownError, WorkerLostError
from lightning_byzantine.exchange import heartbeat
from lightning_byzantine.exchange.heartbeat import Heartbeat

Start = Callable[..., list[Heartbeat]]


@pytest.fixture
def start(monkeypatch: pytest.MonkeyPatch) -> Iterator[Start]:
    monkeypatch.setattr(heartbeat, "_PERIOD", 0.05)
    monkeypatch.setattr(heartbeat, "_PATIENCE", 1.0)
    started: list[Heartbeat] = []

    def start(store: HashStore, num_ranks: int = 3, timeout: float = 1000) -> list[Heartbeat]:
        limit = timedelta(seconds=timeout)
        started.extend(Heartbeat(store, "run", rank, num_ranks, limit) for rank in range(num_ranks))
        for each in started:
            each.start()
        return started

    yield start
    for each in started:
        each.stop()


def fail(watched: Heartbeat, error: Exception | None = None, after: float = 0) -> None:
    with watched.watching():
        time.sleep(after)
        raise error or RuntimeError("connection closed by peer")


def test_names_who_has_fallen_silent(start: Start) -> None:
    first, second, third = start(HashStore())
    second.stop()
    with pytest.raises(WorkerLostError, match="Lost rank 1: no sign of life for 1 s") as caught:
        fail(first)
    assert caught.value.ranks == [1]
    assert str(caught.value.__cause__) == "connection closed by peer"
    assert first.lost is caught.value
    # Who was found out to be missing first stays the one who is, though the finder is gone by now.
    first.stop()
    with pytest.raises(WorkerLostError, match="Lost rank 1: "):
        fail(third)


def test_names_who_is_late_when_time_has_run_out(start: Start) -> None:
    first, _, third = start(HashStore(), timeout=0.5)
    with third.watching():
        pass
    with pytest.raises(WorkerLostError, match="Lost rank 1: alive, but the others waited for it for more than"):
        fail(first, after=0.5)


def test_the_first_rank_which_may_host_the_store_waits_until_all_have_found_out(start: Start) -> None:
    first, second, third = start(HashStore())
    third.stop()
    with ThreadPoolExecutor() as pool:
        later = pool.submit(fail, second, after=1.5)
        with pytest.raises(WorkerLostError, match="Lost rank 2: "):
            fail(first)
        assert isinstance(later.exception(timeout=0.5), WorkerLostError)


def test_other_errors_stay_what_they_are(start: Start) -> None:
    first, *_ = start(HashStore())
    with pytest.raises(RuntimeError, match="shapes do not match") as caught:
        fail(first, RuntimeError("shapes do not match"))
    assert type(caught.value) is RuntimeError
    for error in (ByzantineBreakdownError([0], 3, 0), WorkerLostError([1], "gone"), ValueError("no number")):
        with pytest.raises(type(error)) as other:
            fail(first, error)
        assert other.value is error
    assert first.lost is None


class Silent:
    """Answers no more, and has no timeout, as the store of a process that was stopped."""

    def __init__(self, *_: object) -> None:
        """Stand in for a client of the real one."""

    def add(self, key: str, value: int) -> int:
        time.sleep(5)
        return 0


class Gone(Silent):
    def add(self, key: str, value: int) -> int:
        raise RuntimeError("connection refused")


@pytest.mark.parametrize("store", [Silent, Gone])
@pytest.mark.parametrize(
    ("by_torchrun", "message"),
    [("False", "Lost rank 0: it does not answer"), ("True", "Lost contact: the torchrun of the first node")],
)
def test_a_store_that_does_not_answer_is_missing_itself(
    start: Start, monkeypatch: pytest.MonkeyPatch, store: type[Silent], by_torchrun: str, message: str
) -> None:
    monkeypatch.setattr(heartbeat, "PrefixStore", store)
    monkeypatch.setenv("TORCHELASTIC_USE_AGENT_STORE", by_torchrun)
    _, second, _ = start(HashStore())
    with pytest.raises(WorkerLostError, match=message):
        fail(second)
