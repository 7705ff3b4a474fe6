"""A broadcast by every rank after which all agree on what each has said, whoever lies."""

from collections.abc import Callable, Iterator
from hashlib import sha256
from struct import Struct, error

from lightning_byzantine.errors import EquivocationError
from lightning_byzantine.exchange.channel import Channel
from lightning_byzantine.exchange.conflicts import Conflicts
from lightning_byzantine.exchange.signing import SIGNATURE_BYTES, SigningKey, is_signed

__all__ = ["AgreedBroadcast"]

_HEADER = Struct("<III")  # who says it, how long it is, how many signatures follow
_SIGNER = Struct("<I")
# Two different statements of one rank in one broadcast prove that it lies; more prove no more.
_ENOUGH = 2


class AgreedBroadcast:
    """Signed statements, passed on in f + 1 rounds until everybody knows what anybody does.

    In round r a rank believes a statement that r ranks have signed, the first of them the one whose it is; it signs
    what is new to it, and passes it on. What one honest rank believes before the last round, all do one round later.
    What one believes in the last round has f + 1 signatures, one of an honest rank that has passed it on before. So all
    honest ranks believe the same at the end, for any number f of liars. Without a statement, a round is a message of 8
    bytes between each two ranks.

    To be created on all ranks at once, and called in the same order.

    Args:
        channel: among all ranks.
        conflicts: knows the ranks that are proved to be faulty, to which nobody listens.

    Raises:
        EquivocationError: if a rank tells others another public key, or says that somebody does.

    Source: Dolev & Strong, "Authenticated algorithms for Byzantine agreement", SIAM Journal on Computing 12 (1983).

    """

    def __init__(self, channel: Channel, conflicts: Conflicts) -> None:
        self._channel = channel
        self._conflicts = conflicts
        self._key = SigningKey()
        self._public = channel.tell(self._key.public)
        # Names this run: signatures of an earlier one are worth nothing.
        self._name = sha256(b"".join(self._public)).digest()
        names = channel.tell(self._name)
        differing = [rank for rank, name in enumerate(names) if name != self._name]
        if differing:
            raise EquivocationError(differing, "received other public keys, or say so, before training could begin")
        self._count = 0

    def __call__(self, statement: bytes | None) -> list[frozenset[bytes]]:
        """Return what each rank has stated, the same on all honest ranks.

        Args:
            statement: this rank's; None for nothing.

        Returns:
            For each rank its statement, or nothing; two if it has signed several, which only liars do.

        """
        self._count += 1
        rank, voters, most = self._channel.rank, self._conflicts.voters, self._conflicts.max_left
        believed: list[set[bytes]] = [set() for _ in self._public]
        news: list[bytes] = []
        if statement is not None:
            believed[rank].add(statement)
            news.append(self._signed(rank, statement, {}))
        for number in range(1, most + 2):
            messages = self._channel.tell_each([b"".join(news)] * self._channel.num_ranks)
            news = []
            for voter in voters:
                for author, content, signatures in _entries(messages[voter]) if voter != rank else ():
                    if author not in voters or content in believed[author] or len(believed[author]) == _ENOUGH:
                        continue
                    if not self._is_credible(author, content, signatures, number):
                        break  # no honest rank passes this on; what else there is may be as long to check
                    believed[author].add(content)
                    if number <= most:
                        news.append(self._signed(author, content, signatures))
        return [frozenset(contents) for contents in believed]

    def _is_credible(self, author: int, content: bytes, signatures: dict[int, bytes], number: int) -> bool:
        signers = [signer for signer in signatures if signer in self._conflicts.voters]
        if author not in signers or len(signers) < number:
            return False
        text = self._text(author, content)
        return all(is_signed(text, signatures[signer], self._public[signer]) for signer in signers)

    def _signed(self, author: int, content: bytes, signatures: dict[int, bytes]) -> bytes:
        """Return an entry with this rank's signature added."""
        signatures = signatures | {self._channel.rank: self._key.sign(self._text(author, content))}
        header = _HEADER.pack(author, len(content), len(signatures))
        return header + content + b"".join(_SIGNER.pack(signer) + proof for signer, proof in signatures.items())

    def _text(self, author: int, content: bytes) -> bytes:
        """Return what is signed: which broadcast it is in, of whom, and what is stated."""
        return self._name + f"{self._count},{author},".encode() + content


def _entries(message: bytes) -> Iterator[tuple[int, bytes, dict[int, bytes]]]:
    """Yield author, content and signatures by signer, up to where a message stops making sense."""
    place = 0

    def take(count: int) -> bytes:
        nonlocal place
        taken = message[place : place + count]
        if len(taken) < count:
            raise error
        place += count
        return taken

    try:
        while place < len(message):
            author, length, num_signatures = _HEADER.unpack(take(_HEADER.size))
            content = take(length)
            yield author, content, dict(_signature(take) for _ in range(num_signatures))
    except error:
        return


def _signature(take: Callable[[int], bytes]) -> tuple[int, bytes]:
    (signer,) = _SIGNER.unpack(take(_SIGNER.size))
    return signer, take(SIGNATURE_BYTES)
