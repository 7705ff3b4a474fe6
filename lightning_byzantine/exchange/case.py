"""One exchange after which all honest ranks have the same rows, whatever they were sent at first."""

import os
from collections.abc import Callable, Iterable, Sequence
from hashlib import sha256
from typing import NamedTuple

from torch import Tensor

from lightning_byzantine.errors import EquivocationError
from lightning_byzantine.exchange.collectives import is_direct
from lightning_byzantine.exchange.keyed_digest import digest_of
from lightning_byzantine.exchange.witnesses import Witnesses

__all__ = ["Case"]

_DIGEST_BYTES = 32
_NONCE_BYTES = 16


class _Heard(NamedTuple):
    """What a rank has received from another one: a digest of its rows, its nonce, and what it stated."""

    rows: bytes
    nonce: bytes
    statement: bytes


# Who gives it, who receives it, and whose rows it is.
_Transfer = tuple[int, int, int]
_ENTRY_BYTES = 2 * _DIGEST_BYTES + _NONCE_BYTES
_NOTHING = _Heard(bytes(_DIGEST_BYTES), bytes(_NONCE_BYTES), bytes(_DIGEST_BYTES))


class Case:
    """Finds out whether a rank has told others different things in an exchange, and if so, lets all have the same.

    Every rank states a digest of what follows from the rows. Usually all statements are equal, and that is all. If
    they aren't, each rank tells all, by a broadcast that liars can't divide, the SHA-256 of what it received from each
    other one; who must have lied follows from that, see :class:`~lightning_byzantine.exchange.conflicts.Conflicts`.
    Rows that m - f ranks have alike are then given to the others, by ranks that have them. Each dispute ends with a
    rank proved to be faulty, or with two in conflict of which one is; from then on, the vector of either reaches the
    other by way of a third rank, so that the same two can't be the cause of another one.

    Digests can be fast ones with a key if ranks :meth:`reveal` nonces after they have received all rows: as long as one
    honest rank has not done so, the key is unknown, and nobody can prepare rows of the same digest.

    Which rank told only a few others something else can't be proved, since they could be the ones that lie. That needs
    f + 1 of them, at once or over the run.

    Args:
        witnesses: knows the conflicts of the run.
        blocks: received memory, [m k, c] contiguous, of which the k rows from r k on came from rank r. May be written
            to.

    """

    def __init__(self, witnesses: Witnesses, blocks: Sequence[Tensor]) -> None:
        self._witnesses = witnesses
        self._channel, self._conflicts = witnesses.channel, witnesses.conflicts
        self._rank = witnesses.channel.rank
        self._blocks = blocks
        self._nonces = [_NOTHING.nonce] * self._channel.num_ranks
        # No function of this object: such a cycle would keep the blocks until the garbage collector runs.
        self._wait: Callable[[], list[bytes]] | None = None
        self._with_nonce: list[int] = []
        self._statements: list[bytes] = []
        self._voters: list[int] = []
        self._complaints: list[frozenset[bytes]] = []
        # Ranks that had received from the first what is agreed on now, so that their statements must follow from it.
        self._informed: list[int] = []
        self._detours = self._planned_detours()
        self._transfer(self._detours)

    def reveal(self) -> None:
        """Start exchanging nonces."""
        if self._conflicts.pairs:
            # The key does not depend on those in conflict, who may still wait for rows: nobody is to know it yet.
            self._channel.tell(b"\0")
        self._wait = self._channel.start_telling(os.urandom(_NONCE_BYTES))

    def key(self) -> bytes:
        """Return the key that follows from the nonces."""
        if self._wait is not None:
            self._nonces, self._wait = self._wait(), None
        if not self._with_nonce:
            # One honest rank's is enough. Who is in conflict could tell each rank another one.
            self._with_nonce = self._conflicts.unsuspected or self._conflicts.voters
        return sha256(b"".join(self._nonces[rank] for rank in self._with_nonce)).digest()

    def is_disputed(self, statement: bytes) -> bool:
        """Return whether any rank has heard others state something else than itself, the same on all honest ranks.

        Args:
            statement: 32 bytes, a digest of all that follows from the rows.

        """
        self._statements = self._channel.tell(statement)
        self._voters = self._conflicts.voters
        heard = [self._statements[rank] for rank in self._voters if not self._conflicts.include(self._rank, rank)]
        complaint = b"" if any(other != statement for other in heard) else None
        self._complaints = self._witnesses.broadcast(complaint)
        return any(self._complaints[rank] for rank in self._voters)

    def settle(self) -> None:
        """Let all honest ranks have the same rows of all ranks that are not proved to be faulty.

        Raises:
            EquivocationError: if more ranks are proved to be faulty than may be.

        """
        is_same = all(is_direct(block.device) for block in self._blocks)
        if not is_same:
            # Those who have passed rows on could have changed them: the sender must not be blamed for it.
            for block in self._blocks:
                rows = block.view(self._channel.num_ranks, -1)
                rows.copy_(self._channel.gather(rows[self._rank].clone()))
            self._detours = []
        before = self._conflicts.proved
        tables = self._tables()
        self._check_complaints(tables)
        self._check_detours(tables)
        accepted = self._conflicts.judge(
            {
                (sender, subject): {rank: table[sender][subject] for rank, table in tables.items()}
                for sender in self._conflicts.voters
                for subject in range(len(_Heard._fields))
            }
        )
        agreed = {
            rank: _Heard(*(accepted[rank, subject] for subject in range(len(_Heard._fields))))
            for rank in self._conflicts.voters
        }
        self._give_rows(tables, agreed)
        for rank in self._conflicts.voters:
            self._nonces[rank], self._statements[rank] = agreed[rank].nonce, agreed[rank].statement
        self._informed = []
        if is_same and self._conflicts.proved == before:
            self._informed = [
                rank
                for rank, table in tables.items()
                if all(table[sender].rows == heard.rows for sender, heard in agreed.items())
                and all(table[sender].nonce == agreed[sender].nonce for sender in self._with_nonce)
            ]
        self._witnesses.announce()

    def is_final(self, result: bytes, statement: bytes) -> bool:
        """Return whether all ranks that are not proved to be faulty have the same result, after a dispute.

        If not, more are proved to be faulty now, and the result has to be computed without their rows.

        Args:
            result: 32 bytes, a digest of all that follows from the rows, without a key.
            statement: the digest of the same with the :meth:`key`.

        Raises:
            EquivocationError: if honest ranks compute different results from the same rows.

        """
        before, informed, self._informed = self._conflicts.proved, self._informed, []
        self._conflicts.prove([rank for rank in informed if self._statements[rank] != statement])
        if self._conflicts.proved == before:
            results = self._broadcast(result)
            agreed = self._conflicts.accepted(results)
            if agreed is None:
                raise EquivocationError(
                    [rank for rank, other in results.items() if other != result],
                    f"computed something else from the same rows than rank {self._rank}. Do all ranks run the same"
                    " version of torch, on the same kind of device, with the same number of threads?",
                )
            self._conflicts.prove([rank for rank, other in results.items() if other != agreed])
        self._witnesses.announce()
        return self._conflicts.proved == before

    def _tables(self) -> dict[int, list[_Heard]]:
        """Return what each rank has received, by rank; this proves those to be faulty that don't say so clearly."""
        voters = self._conflicts.voters
        own = [
            _Heard(digest_of(self._rows_of(rank)), self._nonces[rank], self._statements[rank])
            if rank in voters
            else _NOTHING
            for rank in range(self._channel.num_ranks)
        ]
        tables = self._broadcast(b"".join(map(b"".join, own)))
        unclear = [rank for rank, table in tables.items() if len(table) != _ENTRY_BYTES * len(own)]
        self._conflicts.prove(unclear)
        return {rank: list(_entries(table)) for rank, table in tables.items() if rank not in unclear}

    def _broadcast(self, message: bytes) -> dict[int, bytes]:
        """Return everybody's message; this proves those to be faulty that say nothing, or more than one thing."""
        said = self._witnesses.broadcast(message)
        self._conflicts.prove([rank for rank in self._conflicts.voters if len(said[rank]) != 1])
        return {rank: next(iter(said[rank])) for rank in self._conflicts.voters}

    def _check_complaints(self, tables: dict[int, list[_Heard]]) -> None:
        """Prove those to be faulty that had nothing to complain about, by what they say themselves."""
        for rank in [rank for rank in self._voters if self._complaints[rank] and rank in tables]:
            heard = [tables[rank][other] for other in self._voters if not self._conflicts.include(rank, other)]
            if all(other.statement == tables[rank][rank].statement for other in heard):
                self._conflicts.prove([rank])

    def _give_rows(self, tables: dict[int, list[_Heard]], agreed: dict[int, _Heard]) -> None:
        """Let those who have received other rows than are agreed on have these, from one who has them."""
        lacking = [
            (rank, sender)
            for sender, heard in agreed.items()
            for rank, table in tables.items()
            if rank in agreed and table[sender].rows != heard.rows
        ]
        failed: set[_Transfer] = set()
        while lacking:
            plan = [(self._helper(rank, sender, tables, agreed, failed), rank, sender) for rank, sender in lacking]
            # At least one of those that a rank does not get along with is honest.
            self._conflicts.prove([rank for helper, rank, _ in plan if helper is None])
            now = self._failed([(helper, rank, sender) for helper, rank, sender in plan if helper is not None], agreed)
            failed.update(now)
            voters = self._conflicts.voters
            lacking = [(rank, sender) for _, rank, sender in now if rank in voters and sender in voters]

    def _helper(
        self, rank: int, sender: int, tables: dict[int, list[_Heard]], agreed: dict[int, _Heard], failed: set[_Transfer]
    ) -> int | None:
        """Return who is to give a rank what another one has sent; None if nobody is left."""
        for helper in self._conflicts.voters:
            has_it = tables[helper][sender].rows == agreed[sender].rows
            if has_it and not self._conflicts.include(helper, rank) and (helper, rank, sender) not in failed:
                return helper
        return None

    def _failed(self, plan: list[_Transfer], agreed: dict[int, _Heard]) -> list[_Transfer]:
        """Carry out transfers; return those after which the receiver says that it has still other rows."""
        self._transfer(plan)
        verdict = bytes(
            rank == self._rank and digest_of(self._rows_of(sender)) != agreed[sender].rows for _, rank, sender in plan
        )
        verdicts = self._broadcast(verdict)
        failed = []
        for index, (helper, rank, sender) in enumerate(plan):
            if rank in verdicts and verdicts[rank][index : index + 1] != b"\0":
                failed.append((helper, rank, sender))
                self._conflicts.add(helper, rank)
        return failed

    def _check_detours(self, tables: dict[int, list[_Heard]]) -> None:
        """Find conflicts between those who were to pass rows on, and those who say that they received others."""
        for helper, rank, sender in self._detours:
            if {helper, rank} <= tables.keys() and tables[helper][sender].rows != tables[rank][sender].rows:
                self._conflicts.add(helper, rank)

    def _planned_detours(self) -> list[_Transfer]:
        """Return who is to pass on what ranks in conflict have sent each other."""
        plan: list[_Transfer] = []
        for pair in sorted(self._conflicts.pairs):
            for rank, sender in (pair, pair[::-1]):
                helpers = self._helpers(rank, sender)
                if helpers and {rank, sender} <= set(self._conflicts.voters):
                    plan.append((helpers[0], rank, sender))
        return plan

    def _helpers(self, rank: int, sender: int) -> list[int]:
        avoided = self._partners(rank) | self._partners(sender) | {rank, sender}
        return [helper for helper in self._conflicts.voters if helper not in avoided]

    def _transfer(self, plan: list[_Transfer]) -> None:
        """Let the first of each triple send the second one the rows that the third has sent."""
        sent = [(part, rank) for helper, rank, sender in plan if helper == self._rank for part in self._rows_of(sender)]
        received = [
            (part, helper) for helper, rank, sender in plan if rank == self._rank for part in self._rows_of(sender)
        ]
        if sent or received:
            self._channel.transfer(sent, received)

    def _rows_of(self, sender: int) -> list[Tensor]:
        return [block.view(self._channel.num_ranks, -1)[sender] for block in self._blocks]

    def _partners(self, rank: int) -> set[int]:
        """Return the ranks that a rank is in conflict with."""
        return {other for other in self._conflicts.voters if self._conflicts.include(rank, other)}


def _entries(table: bytes) -> Iterable[_Heard]:
    for start in range(0, len(table), _ENTRY_BYTES):
        entry = table[start : start + _ENTRY_BYTES]
        split = _DIGEST_BYTES + _NONCE_BYTES
        yield _Heard(entry[:_DIGEST_BYTES], entry[_DIGEST_BYTES:split], entry[split:])
