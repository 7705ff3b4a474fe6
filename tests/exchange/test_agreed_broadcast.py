"""Five ranks, two of them liars who know each other's keys: what the honest ones believe is the same."""

from collections.abc import Callable
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from lying import saying
from rank_pool import RankPool

from lightning_byzantine import EquivocationError
from lightning_byzantine.exchange.agreed_broadcast import AgreedBroadcast
from lightning_byzantine.exchange.channel import Channel
from lightning_byzantine.exchange.conflicts import Conflicts
from lightning_byzantine.exchange.signing import SigningKey

LIARS, HONEST = (1, 2), (0, 3, 4)
ROUNDS = 3
# By liar, round and receiver, what is sent.
Script = dict[tuple[int, int, int], bytes]


def known_key(rank: int) -> SigningKey:
    """Return the key of a liar, which the other one has as well."""
    with mock.patch("secrets.token_bytes", lambda length: bytes([rank]) * length):
        return SigningKey()


def entry(broadcast: AgreedBroadcast, author: int, content: bytes, signers: tuple[int, ...]) -> bytes:
    """Return a statement with signatures of liars, the last one's added by the code under test."""
    text, (*first, last) = broadcast._text(author, content), signers
    signatures = {signer: known_key(signer).sign(text) for signer in first}
    with mock.patch.multiple(broadcast, _key=known_key(last), _channel=mock.Mock(rank=last)):
        return broadcast._signed(author, content, signatures)


SCRIPTS: dict[str, tuple[Callable[[AgreedBroadcast], Script], list[set[bytes]]]] = {
    "silence": (lambda b: {}, [set(), set()]),
    "told one rank only": (lambda b: {(1, 1, 0): entry(b, 1, b"x", (1,))}, [{b"x"}, set()]),
    "kept back for a round": (lambda b: {(1, 2, 3): entry(b, 1, b"x", (1, 2))}, [{b"x"}, set()]),
    "kept back without another's signature": (lambda b: {(1, 2, 3): entry(b, 1, b"x", (1,))}, [set(), set()]),
    "kept back to the end": (lambda b: {(1, 3, 3): entry(b, 1, b"x", (1, 2))}, [set(), set()]),
    "two statements": (
        lambda b: {(1, 1, 0): entry(b, 1, b"x", (1,)), (1, 1, 4): entry(b, 1, b"y", (1,))},
        [{b"x", b"y"}, set()],
    ),
    "the other one's": (lambda b: {(1, 1, 0): entry(b, 2, b"x", (2,))}, [set(), {b"x"}]),
    "in an honest one's name": (lambda b: {(1, 1, 3): entry(b, 0, b"x", (1,))}, [set(), set()]),
    "nonsense": (
        lambda b: {
            (1, 1, 0): b"nonsense",
            (1, 1, 3): entry(b, 1, b"x", (1,))[:-1],
            (2, 2, 4): b"\xff" * 4000,
            (2, 3, 0): entry(b, 2, b"", (2,))[:9],
        },
        [set(), set()],
    ),
}


def broadcast(name: str) -> list[set[bytes]]:
    rank = dist.get_rank()
    channel, conflicts = Channel(torch.device("cpu")), Conflicts(5, 2)
    key = known_key(rank) if rank in LIARS else SigningKey()
    with mock.patch("lightning_byzantine.exchange.agreed_broadcast.SigningKey", lambda: key):
        broadcast = AgreedBroadcast(channel, conflicts)
    if rank not in LIARS:
        return [set(said) for said in broadcast(None if rank == 4 else f"rank {rank}".encode())]
    broadcast._count = 1
    script = SCRIPTS[name][0](broadcast)
    for number in range(1, ROUNDS + 1):
        channel.tell_each([script.get((rank, number, receiver), b"") for receiver in range(5)])
    return []


@pytest.mark.parametrize("name", SCRIPTS)
def test_all_honest_ranks_believe_the_same(five_ranks: RankPool, name: str) -> None:
    results = five_ranks.run(broadcast, name)
    expected = SCRIPTS[name][1]
    for rank in HONEST:
        assert results[rank] == [{b"rank 0"}, *expected, {b"rank 3"}, set()]


def broadcast_twice() -> list[list[frozenset[bytes]]]:
    """State the same as rank 0 twice; the second time, another rank repeats what rank 0 has signed the first time."""
    channel, conflicts = Channel(torch.device("cpu")), Conflicts(3, 1)
    broadcast, tell_each, heard = AgreedBroadcast(channel, conflicts), channel.tell_each, []

    def listening(messages: list[bytes]) -> list[bytes]:
        received = tell_each(messages)
        heard.append(received[0])
        return received

    with mock.patch.object(channel, "tell_each", listening):
        first = broadcast(b"once" if channel.rank == 0 else None)

    def repeating(messages: list[bytes]) -> list[bytes]:
        return tell_each([heard[0]] * 3 if channel.rank == 1 else messages)

    with mock.patch.object(channel, "tell_each", repeating):
        return [first, broadcast(None)]


def test_what_was_signed_before_is_worth_nothing(three_ranks: RankPool) -> None:
    for first, second in three_ranks.run(broadcast_twice):
        assert [set(said) for said in first] == [{b"once"}, set(), set()]
        assert not any(second)


def two_keys() -> list[int]:
    """Create a broadcast for which rank 1 sends rank 0 another public key than the others."""
    channel = Channel(torch.device("cpu"))

    def say(tensor: torch.Tensor, dst: int) -> torch.Tensor:
        forged = channel.rank == 1 and dst == 0 and tensor.numel() == 256
        return tensor.flip(0) if forged else tensor

    with saying(say), pytest.raises(EquivocationError) as caught:
        AgreedBroadcast(channel, Conflicts(3, 1))
    return caught.value.ranks


def test_two_public_keys_are_an_error(three_ranks: RankPool) -> None:
    assert three_ranks.run(two_keys) == [[1, 2], [0], [0]]
