"""What a failed collective is put down to. With real processes: test_process_faults.py and test_parting.py."""

import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta

import pytest
from torch.distributed import HashStore

from lightning_byzantine.errors import ByzantineBreakdownError, DesynchronizedRanksError, WorkerLostError
from lightning_byzantine.watch import board, heartbeat
from lightning_byzantine.watch.heartbeat import Heartbeat
from lightning_byzantine.watch.whereabouts import Whereabouts, find_desynchronized

Start = Callable[..., list[Heartbeat]]


@pytest.fixture
def start(monkeypatch: pytest.MonkeyPatch) -> Iterator[Start]:
    monkeypatch.setattr(heartbeat, "_PERIOD", 0.05)
    monkeypatch.setattr(heartbeat, "_PATIENCE", 1.0)
    monkeypatch.setattr(heartbeat, "_UNUSUAL_WAIT", 0.2)
    monkeypatch.setattr(heartbeat, "_GRACE", 0.2)
    monkeypatch.setattr(heartbeat, "abort_collectives", lambda *_: None)  # all ranks are one process here
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


CLOSED = "[third_party/gloo/gloo/transport/tcp/pair.cc:553] Connection closed by peer"


def fail(watched: Heartbeat, error: Exception | None = None, after: float = 0, place: str = "backward") -> None:
    with watched.watching(place):
        time.sleep(after)
        raise error or RuntimeError(CLOSED)


def test_names_who_has_fallen_silent(start: Start) -> None:
    first, second, third = start(HashStore())
    second.stop()
    with pytest.raises(WorkerLostError, match="Lost rank 1: no sign of life for 1 s") as caught:
        fail(first)
    assert caught.value.ranks == [1]
    assert str(caught.value.__cause__) == CLOSED
    # Who was found out to be missing first stays the one who is, though the finder is gone by now.
    first.stop()
    with pytest.raises(WorkerLostError, match="Lost rank 1: "):
        fail(third)


@pytest.mark.parametrize("seconds", [0.3, 0.9])
def test_a_slow_store_hides_nobody(start: Start, monkeypatch: pytest.MonkeyPatch, seconds: float) -> None:
    first, second, _ = start(HashStore())
    second.stop()

    def read(self: board.Board, fast: Callable[..., list[Whereabouts]] = board.Board.read) -> list[Whereabouts]:
        stated = fast(self)
        time.sleep(seconds)
        return stated

    monkeypatch.setattr(board.Board, "read", read)
    with pytest.raises(WorkerLostError, match="Lost rank 1: no sign of life for 1 s"):
        fail(first)


def test_names_who_is_late_when_time_has_run_out(start: Start) -> None:
    first, _, third = start(HashStore(), timeout=0.5)
    with third.watching("backward"):
        pass
    with pytest.raises(WorkerLostError, match="Lost rank 1: alive, but the others waited for it for more than"):
        fail(first, after=0.5)


def test_who_waits_itself_is_not_late(start: Start) -> None:
    # The first is ahead of both others, which wait for it in what it has left without sending.
    first, second, third = start(HashStore(), timeout=0.5)
    with first.watching("backward"):
        pass
    error = pytest.raises(DesynchronizedRanksError, match="rank 0 in the next batch; ranks 1, 2 in backward")
    with error, second.watching("backward"), third.watching("backward"):
        fail(first, after=0.5, place="the next batch")


def test_names_where_all_are_who_wait_for_each_other(start: Start) -> None:
    first, second, third = start(HashStore())
    error = pytest.raises(DesynchronizedRanksError, match="rank 2 in the end of the run; ranks 0, 1 in backward")
    with error as caught, second.watching("backward"), third.watching("the end of the run"):
        fail(first, after=1)
    assert caught.value.ranks == [2]
    with pytest.raises(DesynchronizedRanksError, match="rank 2 in the end of the run; ranks 0, 1 in backward"):
        fail(second)


def test_names_who_has_failed(start: Start) -> None:
    first, second, _ = start(HashStore())
    second.fail(ValueError("out of range"))
    with pytest.raises(WorkerLostError, match="Lost rank 1: it has failed with ValueError: out of range"):
        fail(first)


def test_a_failed_rank_stays_until_the_others_have_ended(start: Start, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(heartbeat, "_COURTESY", 60)
    first, second, third = start(HashStore())
    first.fail(ValueError("out of range"))
    with ThreadPoolExecutor() as pool:
        staying = pool.submit(first.stay)
        second.stop()  # is silent, so that nobody waits for it
        with pytest.raises(WorkerLostError):
            fail(third)
        assert not staying.done()
        third.stay()
        staying.result(timeout=5)


def test_other_errors_stay_what_they_are(start: Start) -> None:
    first, *_ = start(HashStore())
    errors = [RuntimeError("shapes do not match"), ByzantineBreakdownError([0], 3, 0), ValueError("no number")]
    for error in errors:
        began = time.monotonic()
        with pytest.raises(type(error)) as caught:
            fail(first, error)
        assert caught.value is error
        assert time.monotonic() - began < 1  # without looking for who is missing
    assert first.error is None


def test_what_another_rank_writes_is_read_with_care(start: Start) -> None:
    store = HashStore()
    first, *_ = start(store)
    for text in [
        "",
        "[]",
        "{",
        '{"entered": 1e400}',
        "[" * 100_000,
        '{"beats": 0, "entered": "x", "places": 3}',
        "\\ud800",
    ]:
        assert Whereabouts.decode(text) == Whereabouts()
        store.set("lightning_byzantine/run/rank/1", text)
    with pytest.raises(RuntimeError, match="Connection closed"):
        fail(first)  # nobody is missing


@pytest.mark.parametrize("text", ["[]", '"abc"', "[" * 100_000, '{"lost": [1e999], "reason": ""}', '{"lost": 3}', "{}"])
def test_a_reason_that_can_not_be_read_ends_the_run_all_the_same(start: Start, text: str) -> None:
    store = HashStore()
    first, *_ = start(store)
    store.set("lightning_byzantine/run/end", text)
    with pytest.raises(WorkerLostError, match="gives a reason that can't be read"):
        fail(first)


def test_ranks_that_send_nothing_are_together(start: Start) -> None:
    first, second, third = start(HashStore(), timeout=0.5)
    error = pytest.raises(WorkerLostError, match="all ranks are in backward, and one has sent nothing for")
    with error, second.watching("backward"), third.watching("backward"):
        fail(first, after=0.5)


def test_ranks_that_are_not_equally_far_are_on_the_same_way() -> None:
    here = Whereabouts()
    for number in range(100):
        ahead = here.entering(f"backward of batch {number}")
        assert find_desynchronized([here, ahead, here]) is None
        here = ahead
    assert find_desynchronized([here, Whereabouts()]) is None  # too far apart to know


class Silent:
    """Answers no more, and has no timeout, as the store of a process that was stopped."""

    def __init__(self, *_: object) -> None:
        """Stand in for a client of the real one."""

    def set(self, key: str, value: str) -> None:
        time.sleep(5)

    def check(self, keys: list[str]) -> bool:
        return False


class Gone(Silent):
    def set(self, key: str, value: str) -> None:
        raise RuntimeError("connection refused")


@pytest.mark.parametrize("store", [Silent, Gone])
@pytest.mark.parametrize(
    ("by_torchrun", "message"),
    [("False", "Lost rank 0: it does not answer"), ("True", "Lost contact: the torchrun of the first node")],
)
def test_a_store_that_does_not_answer_is_missing_itself(
    start: Start, monkeypatch: pytest.MonkeyPatch, store: type[Silent], by_torchrun: str, message: str
) -> None:
    monkeypatch.setattr(board, "PrefixStore", store)
    monkeypatch.setenv("TORCHELASTIC_USE_AGENT_STORE", by_torchrun)
    _, second, _ = start(HashStore())
    with pytest.raises(WorkerLostError, match=message):
        fail(second)


def test_an_error_that_nobody_is_missing_for_has_no_consequences(start: Start) -> None:
    first, second, third = start(HashStore())
    with pytest.raises(RuntimeError, match="Connection closed"):
        fail(first)
    second.stop()  # is silent from now on, which is nobody's business until a collective fails
    time.sleep(1.5)
    with first.watching("backward"), third.watching("backward"):
        pass
    assert first.error is None
